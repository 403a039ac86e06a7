"""Compare pinned versions with the published advisories, by pip-audit; without a network, say so and pass.

``python -m tools.audit constraints.txt`` ends with 1 where a pinned version has a known vulnerability.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SECONDS = 600
NAMED = 5
"""Names of packages that a line has at most."""


def audited(pins: Path) -> tuple[list[str], str]:
    """The pinned versions with advisories, and of what nothing is known and why (empty: all is known)."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(pins), "--no-deps", "--disable-pip"]
    command += ["--format", "json", "--progress-spinner", "off"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return [], f"no answer in {SECONDS} s"
    try:
        found: dict[str, Any] = json.loads(run.stdout)
    except ValueError:
        return [], (run.stderr.strip().splitlines() or ["no answer"])[-1]
    return list(advisories(found)), left_out(found)


def advisories(found: dict[str, Any]) -> list[str]:
    """Lines of pip-audit's JSON.

    >>> advisories({"dependencies": [{"name": "a", "version": "1", "vulns": [{"id": "X-1", "fix_versions": ["2"]}]}]})
    ['a 1: X-1, mended in 2']
    """
    return [
        f"{package['name']} {package['version']}: {entry['id']}, mended in "
        + (", ".join(entry["fix_versions"]) or "none yet")
        for package in found["dependencies"]
        for entry in package.get("vulns", ())
    ]


def left_out(found: dict[str, Any]) -> str:
    """What pip-audit could not look up: versions that are not on PyPI, or all of them behind a mirror.

    >>> known, other = {"name": "a", "version": "1", "vulns": []}, {"name": "b", "skip_reason": "not found"}
    >>> left_out({"dependencies": [known, other]})
    '1 of 2 packages could not be looked up (b: not found)'
    >>> left_out({"dependencies": [known]})
    ''
    """
    skipped = [package for package in found["dependencies"] if "skip_reason" in package]
    if not skipped:
        return ""
    names = ", ".join(package["name"] for package in skipped[:NAMED]) + (", ..." if len(skipped) > NAMED else "")
    why = f"{names}: {skipped[0]['skip_reason']}"
    return f"{len(skipped)} of {len(found['dependencies'])} packages could not be looked up ({why})"


def main(pins: str) -> int:
    """Print what was found."""
    found, unknown = audited(Path(pins))
    for line in found:
        print(line)
    if unknown:
        print(f"audit incomplete: {unknown}")
    elif not found:
        print("no advisory for any pinned version")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

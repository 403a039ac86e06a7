"""Check pinned versions for published advisories with pip-audit; without a network, report that and pass.

``python -m tools.audit constraints.txt`` exits with 1 if a pinned version has a known vulnerability.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SECONDS = 600
NAMED = 5
"""Maximum number of package names in a message."""


def audited(pins: Path) -> tuple[list[str], str]:
    """Advisories for the pinned versions, and what could not be checked and why (empty if everything was)."""
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
    """One line per advisory in pip-audit's JSON.

    >>> advisories({"dependencies": [{"name": "a", "version": "1", "vulns": [{"id": "X-1", "fix_versions": ["2"]}]}]})
    ['a 1: X-1, fixed in 2']
    """
    return [
        f"{package['name']} {package['version']}: {entry['id']}, fixed in "
        + (", ".join(entry["fix_versions"]) or "none yet")
        for package in found["dependencies"]
        for entry in package.get("vulns", ())
    ]


def left_out(found: dict[str, Any]) -> str:
    """Packages that pip-audit could not look up: versions that are not on PyPI, or all of them behind a mirror.

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
    """Print the findings; returns the exit code."""
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

"""Compare pinned versions with the published advisories, by pip-audit; without a network, say so and pass.

``python -m tools.audit constraints.txt`` ends with 1 where a pinned version has a known vulnerability.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SECONDS = 600


def audited(pins: Path) -> tuple[list[str], str]:
    """The pinned versions with advisories, and why nothing could be asked (empty if it could)."""
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
    return list(advisories(found)), ""


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


def main(pins: str) -> int:
    """Print what was found."""
    found, why = audited(Path(pins))
    print(f"audit skipped: {why}" if why else "\n".join(found) or "no advisory for any pinned version")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

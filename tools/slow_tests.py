"""Lists slow tests: ``python -m tools.slow_tests REPORT.xml`` writes tests/slow.txt from pytest's JUnit report.

A test function is slow if all its parametrised cases together take more than `LIMIT` seconds. ``make slow`` runs the
tests and then this script.
"""

import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree as ET

ROOT = Path(__file__).parents[1]
LIMIT = 0.25


def slow_tests(report: Path) -> list[str]:
    """Sorted ``path::name`` of the slow test functions in a report."""
    seconds: dict[str, float] = defaultdict(float)
    for case in ET.parse(report).iter("testcase"):
        path = case.attrib["classname"].replace(".", "/") + ".py"
        if path.startswith("tests/"):  # not a doctest
            seconds[f"{path}::{case.attrib['name'].partition('[')[0]}"] += float(case.attrib["time"])
    return sorted(name for name, taken in seconds.items() if taken > LIMIT)


if __name__ == "__main__":
    (ROOT / "tests" / "slow.txt").write_text("\n".join(slow_tests(Path(sys.argv[1]))) + "\n")

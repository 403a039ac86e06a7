"""The fenced blocks of README.md and docs/, with the directives that say how the tests run them.

A directive is an HTML comment right above a fence, which readers do not see::

    <!-- test: needs=pets,heads nightly -->

``needs=NAME,...``    files, stores and stand-ins of `docs_needs.NEEDS`, made in a scratch folder before the block
``nightly``           the block takes long: it runs in ``make nightly``
``skip="REASON"``     the block cannot run anywhere; the number of these is bounded

A console block has commands after ``$``, continued after a backslash at the end of a line, and comments after ``#``.
Any other line is expected output of the command above it (``...`` stands for anything).
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = ("console", "python", "toml", "")
FENCE = re.compile(r"^```(\w*)\s*$")
DIRECTIVE = re.compile(r"^<!-- test: (.*) -->$")
WORDS = {"needs", "nightly", "skip"}


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    page: Path
    line: int
    language: str
    text: str
    needs: tuple[str, ...] = ()
    nightly: bool = False
    skip: str | None = None

    @property
    def name(self) -> str:
        return f"{self.page.name}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One command of a console block, and the output that the page shows, if any."""

    line: str
    output: str


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    begun, language, directive = 0, "", ""
    held: list[str] = []
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        fence = FENCE.match(line)
        if begun and fence:
            yield _block(page, begun, language, "\n".join(held), directive)
            begun, directive, held = 0, "", []
        elif begun:
            held.append(line)
        elif fence:
            begun, language = number, fence[1]
        elif found := DIRECTIVE.match(line):
            assert not directive, f"{page.name}:{number}: two directives above one block"
            directive = found[1]
        else:
            assert not line.strip() or not directive, f"{page.name}:{number}: a directive belongs right above its block"
    assert not begun, f"{page.name}:{begun}: the fence is never closed"
    assert not directive, f"{page.name}: the last directive has no block"


def jobs(page: Path) -> dict[str, Block]:
    """The blocks of README's fifteen jobs, by the bold heading above each."""
    found: dict[str, Block] = {}
    lines = page.read_text().splitlines()
    for block in blocks(page):
        headings = [line for line in lines[: block.line] if re.match(r"\*\*[0-9]+\. |## ", line)]
        if headings and headings[-1].startswith("**"):
            found[headings[-1].split("**")[1]] = block
    return found


def _block(page: Path, line: int, language: str, text: str, directive: str) -> Block:
    said = dict(word.partition("=")[::2] for word in shlex.split(directive))
    where = f"{page.name}:{line}"
    assert said.keys() <= WORDS, f"{where}: the directive has {said.keys() - WORDS}, expected some of {WORDS}"
    assert said.get("skip", "why") != "", f"{where}: expected skip='REASON'"
    needs = tuple(said["needs"].split(",")) if "needs" in said else ()
    return Block(page, line, language, text, needs, "nightly" in said, said.get("skip"))


def commands(block: Block) -> list[Command]:
    """The commands of a console block."""
    found: list[list[str]] = []
    continued = False
    for line in block.text.splitlines():
        if continued:
            found[-1][0] += " " + line.strip().removesuffix("\\")
        elif line.startswith("$ "):
            found.append([line[2:].removesuffix("\\"), ""])
        else:
            assert found, f"{block.name}: {line!r} is no command and follows none; begin commands with '$ '"
            found[-1][1] += f"{line}\n"
            continue
        continued = line.endswith("\\")
    return [Command(line, output) for line, output in found]


JOBS = jobs(ROOT / "README.md")

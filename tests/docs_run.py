"""Running a block of the documentation as its reader would."""

import doctest
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from docs_needs import NEEDS, Scratch
from docs_pages import ROOT, Block, Command, commands

from featcache.cli.main import main
from featcache.store.places import local

OUTPUT = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.fixture
def scratch(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Scratch]:
    """A folder as a reader has it: stores go to ./cache."""
    base = tmp_path / "work"
    (base / "home").mkdir(parents=True)
    monkeypatch.chdir(base)
    monkeypatch.delenv("FEATCACHE_ROOT")
    monkeypatch.setenv("HOME", str(base / "home"))
    monkeypatch.setattr(local, "synced", False)
    with ExitStack() as later:
        yield Scratch(base, tmp_path_factory.getbasetemp() / "shared-digits", monkeypatch, later)


def run_block(block: Block, scratch: Scratch, capfd: pytest.CaptureFixture[str]) -> str:
    """Make what a block needs, run it, and return what it printed."""
    for name in block.needs:
        NEEDS[name](scratch)
    text = block.text
    for old, new in scratch.replace.items():
        text = text.replace(old, new)
    if block.language == "python":
        exec(compile(text, block.name, "exec"), dict(scratch.names))
    elif block.language == "toml":
        (scratch.base / "sweep.toml").write_text(text)
        assert main(["sweep", "--file", "sweep.toml"]) == 0
    else:
        shown = Block(block.page, block.line, block.language, text)
        return "".join(run(command, block.name, scratch, capfd) for command in commands(shown))
    return capfd.readouterr().out


def run(command: Command, where: str, scratch: Scratch, capfd: pytest.CaptureFixture[str]) -> str:
    """Run one command as a shell would, compare what it prints with what the page shows, and return it."""
    words = shlex.split(os.path.expandvars(command.line), comments=True)
    capfd.readouterr()
    code = PROGRAMS[words[0]](words[1:], scratch)
    said = capfd.readouterr()
    assert code == 0, f"{where}: $ {command.line}\n{said.err}"
    if command.output:
        assert doctest.OutputChecker().check_output(command.output, said.out, OUTPUT), f"{where}: got\n{said.out}"
    return said.out


def featcache(words: list[str], scratch: Scratch) -> int:
    return main(words)


def export(words: list[str], scratch: Scratch) -> int:
    for word in words:
        name, _, value = word.partition("=")
        scratch.patch.setenv(name, value)
    return 0


def torchrun(words: list[str], scratch: Scratch) -> int:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}).returncode


def pip(words: list[str], scratch: Scratch) -> int:
    """Accepted without running: tests/test_end_to_end.py builds and installs the wheel."""
    return words != ["install", "."]


PROGRAMS = {"featcache": featcache, "export": export, "torchrun": torchrun, "pip": pip}
"""What a command may begin with; a benchmark or another program gets a line here."""

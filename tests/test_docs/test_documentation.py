"""Every fenced block of README.md and docs/ is run as it is printed: see `docs_pages` for the directives."""

import doctest
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest
from docs_needs import NEEDS, Scratch
from docs_pages import LANGUAGES, PAGES, ROOT, Block, Command, blocks, commands

from featcache.cli.main import VERBS, Parser, main
from featcache.store.places import local

MOST_SKIPPED = 0
OUTPUT = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
ALL = [block for page in PAGES for block in blocks(page)]
RUN = [
    pytest.param(block, id=block.name, marks=[pytest.mark.nightly] if block.nightly else [])
    for block in ALL
    if block.language and not block.skip
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


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


@pytest.mark.filterwarnings("default")  # a reader sees warnings, and goes on
@pytest.mark.parametrize("block", RUN)
def test_the_block_runs(block: Block, scratch: Scratch, capfd: pytest.CaptureFixture[str]) -> None:
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
        for command in commands(shown):
            run(command, block.name, scratch, capfd)


def run(command: Command, where: str, scratch: Scratch, capfd: pytest.CaptureFixture[str]) -> None:
    """Run one command as a shell would, and compare what it prints with what the page shows."""
    words = shlex.split(os.path.expandvars(command.line), comments=True)
    capfd.readouterr()
    code = PROGRAMS[words[0]](words[1:], scratch)
    said = capfd.readouterr()
    assert code == 0, f"{where}: $ {command.line}\n{said.err}"
    if command.output:
        assert doctest.OutputChecker().check_output(command.output, said.out, OUTPUT), f"{where}: got\n{said.out}"


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


def make(words: list[str], scratch: Scratch) -> int:
    """The target exists; what it does is tested elsewhere, or is the tests."""
    return subprocess.run(["make", "--dry-run", *words], cwd=ROOT, stdout=subprocess.DEVNULL).returncode


PROGRAMS = {"featcache": featcache, "export": export, "torchrun": torchrun, "make": make}
"""What a command may begin with; a benchmark or another program gets a line here."""


def test_every_fence_has_a_language_that_is_run_or_none() -> None:
    assert not [block.name for block in ALL if block.language not in LANGUAGES]
    assert not [block.name for block in ALL if not block.language and "$ " in block.text], "console blocks say so"


def test_few_blocks_are_skipped() -> None:
    skipped = {block.name: block.skip for block in ALL if block.skip}
    assert len(skipped) <= MOST_SKIPPED, skipped


def test_every_need_is_there_and_used() -> None:
    wanted = {name for block in ALL for name in block.needs}
    assert wanted <= NEEDS.keys()
    assert NEEDS.keys() <= wanted, "a need that no block has can go"


def options() -> Mapping[str, set[str]]:
    """Verb -> its options."""
    from importlib import import_module

    found = {}
    for verb, (module, _) in VERBS.items():
        parser = Parser(prog=verb)
        import_module(module).add_arguments(parser)
        found[verb] = {option for action in parser._actions for option in action.option_strings} | {"--json"}
    return found


def test_options_and_verbs_in_running_text_exist() -> None:
    """``featcache VERB --option`` and ``--option`` in the text name what there is; blocks are run."""
    known = options() | {"help": set()}  # prints another verb's help, and has no parser of its own
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for code in re.findall(r"`([^`\n]+)`", text):
            words = code.split()
            verb = words[1] if words[0] == "featcache" and len(words) > 1 else words[0]
            if words[0] == "featcache" and len(words) > 1 and re.fullmatch(r"[a-z]+", verb):
                assert verb in known, f"{page.name}: `{code}`"
            flags = {word.partition("=")[0] for word in words if re.fullmatch(r"--[a-z][a-z-]*(=.*)?", word)}
            if verb in known:
                assert flags <= known[verb], f"{page.name}: `{code}`: {flags - known[verb]}"


def test_extras_that_are_named_exist() -> None:
    for page in PAGES:
        named = re.findall(r"featcache\[([\w-]+)\]", page.read_text())
        assert set(named) <= set(PROJECT["optional-dependencies"]), page.name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<!-- test: nedds=pets -->\n```console\n$ make\n```", "the directive has {'nedds'}"),
        ("<!-- test: nightly -->\n\ntext\n", "a directive belongs right above its block"),
        ("```console\n$ make\n", "the fence is never closed"),
        ('<!-- test: skip="" -->\n```console\n$ make\n```', "skip='REASON'"),
    ],
)
def test_a_wrong_directive_is_noticed(text: str, said: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(AssertionError, match=re.escape(said)):
        list(blocks(page))


def test_commands_are_continued_and_followed_by_their_output(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```console\n$ one --a 1 \\\n      --b '#2'  # why\nsays\n  this\n$ two\n```\n")
    [block] = blocks(page)
    first, second = commands(block)
    assert shlex.split(first.line, comments=True) == ["one", "--a", "1", "--b", "#2"]
    assert (first.output, second) == ("says\n  this\n", Command("two", ""))


def test_a_command_that_fails_or_says_something_else_fails_its_block(
    scratch: Scratch, capfd: pytest.CaptureFixture[str]
) -> None:
    run(Command("featcache --version", "featcache ..."), "page:1", scratch, capfd)
    for command in (Command("featcache --version", "featcache 99"), Command("featcache encode nothing:here", "")):
        with pytest.raises(AssertionError, match="page:1"):
            run(command, "page:1", scratch, capfd)

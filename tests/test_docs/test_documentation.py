"""Every fenced block of README.md and docs/ is run as it is printed: see `docs_pages` for the directives."""

import re
import shlex
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest
from docs_needs import NEEDS, Scratch
from docs_pages import JOBS, LANGUAGES, PAGES, ROOT, Block, Command, blocks, commands
from docs_run import run, run_block, scratch

from featcache.cli.main import VERBS, Parser

__all__ = ["scratch"]  # a fixture
MOST_SKIPPED = 0
ALL = [block for page in PAGES for block in blocks(page)]
RUN = [
    pytest.param(block, id=block.name, marks=[pytest.mark.nightly] if block.nightly else [])
    for block in ALL
    if block.language and not block.skip and block not in JOBS.values()  # these run in tests/test_jobs
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.filterwarnings("default")  # a reader sees warnings, and continues
@pytest.mark.parametrize("block", RUN)
def test_the_block_runs(block: Block, scratch: Scratch, capfd: pytest.CaptureFixture[str]) -> None:
    run_block(block, scratch, capfd)


def test_every_fence_has_a_language_that_is_run_or_none() -> None:
    assert not [block.name for block in ALL if block.language not in LANGUAGES]
    assert not [block.name for block in ALL if not block.language and "$ " in block.text], "console blocks say so"


def test_few_blocks_are_skipped() -> None:
    skipped = {block.name: block.skip for block in ALL if block.skip}
    assert len(skipped) <= MOST_SKIPPED, skipped


def test_every_need_exists_and_is_used() -> None:
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
    known = {**options(), "help": set()}  # prints another verb's help, and has no parser of its own
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


def test_every_page_is_in_the_menu_of_the_site() -> None:
    """``make docs`` is strict about links; a page that no menu names would only be a remark."""
    menu = (ROOT / "mkdocs.yml").read_text().partition("nav:")[2]
    assert sorted(re.findall(r"(\w+\.md)", menu)) == sorted(page.name for page in PAGES if page.parent.name == "docs")

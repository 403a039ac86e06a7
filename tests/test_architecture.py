"""Rules of the code base: layers, sizes, names, and light imports."""

import ast
import re
import resource
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tools.journeys import journeys
from tools.repeats import repeats

ROOT = Path(__file__).parent.parent
PACKAGES = ("featcache", "heads", "ft")
MAX_FUNCTION, MAX_PARAMETERS = 60, 8
MAX_TOP, MAX_ROOM, MAX_ANY = 12, 18, 270
NOT_DOORS = {"__init__.py", "__main__.py", "__pycache__", "py.typed"}
PAGE = ROOT / "docs" / "architecture.md"
UNPICKLER = ROOT / "ft" / "checkpoints" / "formats" / "trusted.py"


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


@cache
def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of code of a function, its docstring left out."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]


def test_imports_follow_the_layers() -> None:
    lint_imports = Path(sys.executable).parent / "lint-imports"
    command = [str(lint_imports), "--no-cache", "--config", str(ROOT / "pyproject.toml")]
    lint = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert lint.returncode == 0, lint.stdout


def test_functions_stay_readable() -> None:
    long_functions = {
        f"{path.name}:{function.name}": length(function)
        for path in sources()
        for function in functions(path)
        if length(function) > MAX_FUNCTION
    }
    assert not long_functions


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return len([argument for argument in named if argument.arg not in ("self", "cls")])


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Triton kernels take pointers, strides and sizes one by one."""
    return any(ast.unparse(decorator) == "triton.jit" for decorator in function.decorator_list)


def test_functions_have_few_parameters() -> None:
    many = {
        f"{path.relative_to(ROOT)}:{function.name}": parameters(function)
        for path in sources()
        for function in functions(path)
        if parameters(function) > MAX_PARAMETERS and not is_kernel(function)
    }
    assert not many


def test_rooms_have_few_entries() -> None:
    """A room is read by the names in it."""
    folders = [
        path for package in PACKAGES for path in ((ROOT / package), *(ROOT / package).rglob("*/")) if path.is_dir()
    ]
    for folder in (folder for folder in folders if folder.name != "__pycache__"):
        doors = [path.name for path in folder.iterdir() if path.name not in NOT_DOORS]
        assert len(doors) <= (MAX_TOP if folder.parent == ROOT else MAX_ROOM), (folder, sorted(doors))


def test_any_is_rare() -> None:
    """`Any` is for real boundaries: JSON, foreign libraries, what users pass."""
    uses = sum(len(re.findall(r"\bAny\b", path.read_text())) for path in sources())
    assert uses < MAX_ANY


def test_public_functions_say_what_they_do() -> None:
    silent = [
        f"{path.relative_to(ROOT)}:{function.name}"
        for path in sources()
        for function in functions(path)
        if not function.name.startswith("_") and function.col_offset == 0 and not ast.get_docstring(function)
    ]
    assert not silent


def test_nothing_imports_functools_as_ft() -> None:
    assert not [path for path in sources() if "functools as ft" in path.read_text()]


def test_test_folders_hold_no_init() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_unsafe_loading_is_not_used() -> None:
    """Except for one script, which `featcache convert --trust` runs in another process and nothing imports."""
    for path in sources():
        text = path.read_text()
        assert "formats.trusted" not in text, path
        assert "formats import trusted" not in text, path
        if path == UNPICKLER:
            continue
        assert "import pickle" not in text, path
        if "torch" not in text:
            continue
        for call in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)):
            if getattr(call.func, "attr", "") == "load" and ast.unparse(call.func) == "torch.load":
                assert "weights_only=True" in ast.unparse(call), path


@pytest.mark.parametrize("heavy", ["torch", "open_clip", "zarr", "pyarrow", "sklearn", "matplotlib", "scipy"])
def test_importing_a_package_loads_nothing_heavy(heavy: str) -> None:
    script = f"import featcache.cli.main, sys; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_help_answers_at_once() -> None:
    """Under half a second of CPU time, which does not depend on other load."""
    command = [sys.executable, "-m", "featcache", "--help"]
    seconds: list[float] = []
    while len(seconds) < 5 and min(seconds, default=1) >= 0.5:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert "encode" in shown
    assert min(seconds) < 0.5


def test_the_architecture_page_names_what_is_there() -> None:
    """Every ``path.py`` and ``path.py:name`` in docs/architecture.md exists."""
    named = re.findall(r"`((?:featcache|heads|ft|examples)/[\w/]+(?:\.py)?/?)(?::([\w.]+))?`", PAGE.read_text())
    assert len(named) > 40
    for place, name in named:
        assert (ROOT / place).exists(), place
        if name:
            tree: ast.AST = ast.parse((ROOT / place).read_text())
            for part in name.split("."):
                found = [node for node in ast.iter_child_nodes(tree) if getattr(node, "name", None) == part]
                assert found, f"{place}:{name}"
                tree = found[0]


@pytest.mark.nightly
def test_journeys_are_short_and_on_the_architecture_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = PAGE.read_text()
    for (name, journey), most in zip(journeys(tmp_path).items(), (9, 10, 6), strict=True):
        assert journey.files <= most, (name, str(journey))
        assert journey.returns <= 3, (name, str(journey))
        assert f"### {name}: {journey.files} files, {journey.returns} returns\n\n{journey}\n" in page, str(journey)


@pytest.mark.nightly
def test_no_two_places_share_more_than_ten_lines() -> None:
    found = repeats(sources())
    assert [pair for pair in found if pair[0] > 10] == []
    assert len(found) <= 24


def test_links_in_the_documentation_lead_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for link, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text()):
            target = (page.parent / link).resolve() if link else page
            assert target.exists(), f"{page.name}: {link}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
                slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert anchor in slugs, f"{page.name}: {link}#{anchor}"

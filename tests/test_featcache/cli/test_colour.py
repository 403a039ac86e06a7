"""Colours on terminals only, and not under NO_COLOR."""

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from featcache.progress import coloured, printable

ROOT = Path(__file__).parents[3]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


TABLE = "          top1 %     nll\ndigits     98.8*  0.021*\nsketch     64.8   2.288"


def test_the_best_of_a_row_is_bold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    shown = coloured(TABLE, Terminal())
    assert "\x1b[1m98.8*\x1b[0m" in shown
    assert "\x1b[1m0.021*\x1b[0m" in shown
    assert shown.count("\x1b[1m") == 2
    assert shown.replace("\x1b[1m", "").replace("\x1b[0m", "") == TABLE


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_no_colour_in_files_or_under_no_color(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert coloured(TABLE, Terminal()) == TABLE
    assert coloured(TABLE, io.StringIO()) == TABLE


def test_control_characters_in_store_names_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert coloured(printable("\x1b[31mcat"), Terminal()) == "\\x1b[31mcat"


def shown_on_a_terminal(*words: str, **environment: str) -> str:
    ours, theirs = pty.openpty()
    settings = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    settings |= {"PYTHONPATH": str(ROOT), "TERM": "xterm", **environment}
    subprocess.run([sys.executable, "-m", "featcache", *words], env=settings, stderr=theirs)
    os.close(theirs)
    said = os.read(ours, 65_536).decode()
    os.close(ours)
    return said


def test_an_error_is_red_on_a_terminal() -> None:
    assert shown_on_a_terminal("lisst").startswith("\x1b[31mfeatcache: FeatcacheError:\x1b[0m unknown verb 'lisst'")
    assert "\x1b" not in shown_on_a_terminal("lisst", NO_COLOR="1")

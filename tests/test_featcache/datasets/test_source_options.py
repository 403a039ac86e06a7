"""Options of all sources: declared once, converted and checked before anything is opened."""

import re
from inspect import Parameter as Signature

import pytest

import featcache
from featcache.cli.main import main
from featcache.datasets import DATASETS, open_dataset
from featcache.datasets.holdout import Holdout
from featcache.datasets.options import SourceOptions, read_options
from featcache.datasets.sources.huggingface import HubOptions, live_huggingface
from featcache.datasets.sources.table import TableOptions
from featcache.errors import DatasetError
from featcache.parameters import parameters_of

ACCEPTED = {source: parameters_of(DATASETS[source]) for source in DATASETS}
KINDS = {source: accepted["options"].kind for source, accepted in ACCEPTED.items() if "options" in accepted}
OPTIONS = [
    (source, kind, parameter)
    for source, kind in (*KINDS.items(), ("any", Holdout))
    for parameter in parameters_of(kind).values()
]


def one_line(error: pytest.ExceptionInfo, *parts: str) -> None:
    said = str(error.value)
    assert "\n" not in said
    for part in parts:
        assert part in said


@pytest.mark.parametrize(("source", "kind", "parameter"), OPTIONS, ids=[f"{o[0]}-{o[2].name}" for o in OPTIONS])
def test_a_bad_value_names_the_option_and_what_is_allowed(source, kind, parameter) -> None:
    """3.5 is no text, list, share or seed; in a specification, texts and lists take anything."""
    name, expected = parameter.name, parameter.given.expected
    needed = {n: "0.5" for n, p in parameters_of(kind).items() if p.default is Signature.empty}
    with pytest.raises(DatasetError) as error:
        kind(**needed | {name: 3.5})
    one_line(error, f"option {name} is 3.5, expected {expected}")
    if not re.search("string", expected):
        spec = f"{'digits:' if kind is Holdout else source + ':/nowhere'},"
        given = "".join(f",{n}={value}" for n, value in (needed | {name: "?"}).items()).removeprefix(",")
        with pytest.raises(DatasetError) as error:
            open_dataset(spec + given, "train")
        one_line(error, f"option {name} is '?', expected {expected}")


@pytest.mark.parametrize("source", sorted(KINDS))
def test_an_unknown_option_is_refused_with_the_declared_ones(source) -> None:
    with pytest.raises(DatasetError) as error:
        open_dataset(f"{source}:/nowhere,xyz=1", "train")
    one_line(error, f"{source}: unknown option 'xyz'", ", ".join(parameters_of(KINDS[source])))
    assert issubclass(KINDS[source], SourceOptions)


def test_values_are_converted_by_their_declared_types() -> None:
    found = read_options("table", "a, b/t.csv,metadata=region+year,separator=;,label=a=b", TableOptions)
    expected = TableOptions(metadata=["region", "year"], separator=";", label="a=b")
    assert found == ("a, b/t.csv", expected)
    assert (TableOptions().metadata, TableOptions(metadata="+").metadata) == (None, [])
    assert HubOptions(metadata=("region", "year")).metadata == ("region", "year")
    assert Holdout.of_options({"holdout": "2e-1", "holdout_seed": "7"}) == Holdout(0.2, 7)


def test_options_from_python_and_the_command_line_are_checked_alike(capsys) -> None:
    class Rows:
        column_names, split = ["image"], "train"

        def __len__(self) -> int:
            return 0

    with pytest.raises(DatasetError, match="option image is 3, expected a string"):
        live_huggingface(Rows(), None, {"image": 3})
    with pytest.raises(DatasetError, match="option holdout is 2, expected a number above 0 and below 1"):
        featcache.encode("digits", "test", holdout=2)
    assert main(["encode", "digits", "--holdout", "2"]) == DatasetError.exit_code
    assert "option holdout is 2.0, expected a number above 0 and below 1" in capsys.readouterr().err

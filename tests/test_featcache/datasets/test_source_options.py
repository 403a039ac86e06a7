"""Options of all sources: declared once, converted and checked before anything is opened."""

import re
from dataclasses import dataclass
from inspect import Parameter as Signature

import pytest

import featcache
from featcache.cli.main import main
from featcache.datasets import DATASETS, Dataset, open_dataset
from featcache.datasets.classes import ClassOptions
from featcache.datasets.holdout import Holdout
from featcache.datasets.options import SourceOptions, read_options
from featcache.datasets.sources.huggingface import HubOptions, live_huggingface
from featcache.datasets.sources.table import TableOptions
from featcache.datasets.sources.torchvision import declared_options
from featcache.errors import DatasetError
from featcache.parameters import Count, descriptions_of, parameters_of

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
    assert "--holdout: '2', expected a number above 0 and below 1" in capsys.readouterr().err


@dataclass(frozen=True)
class FrameOptions(SourceOptions):
    """Options of a source of another package.

    Parameters
    ----------
    every : take each K-th frame
    """

    every: Count = 1


def open_frames(argument: str, split: str, options: FrameOptions, *, name: str | None = None) -> Dataset:
    """Frames of a video."""
    raise DatasetError(f"{argument}: there are no frames of {split}, got {options} for {name}")


def test_help_lists_every_source_and_the_options_of_those_named(capsys, monkeypatch) -> None:
    monkeypatch.setitem(DATASETS.data, "frames", open_frames)
    for verb in ("encode", "finetune"):
        assert main([verb, "--help"]) == 0
        shown = capsys.readouterr().out
        forms = [line.split()[0] for line in shown.partition("\nsources ")[2].splitlines()[1:]]
        assert sorted({re.split("[:,]", form)[0] for form in forms}) == sorted(DATASETS)
        assert re.search(r"^  frames:ARGUMENT +Frames of a video\.$", shown, re.MULTILINE)
        assert f"`featcache {verb} SOURCE: --help`" in shown
    kinds = KINDS | {"frames": FrameOptions}
    assert main(["encode", *(f"{source}:" for source in kinds), "--help"]) == 0
    shown = capsys.readouterr().out
    for source, kind in (*kinds.items(), ("every source", ClassOptions), ("every source", Holdout)):
        texts = descriptions_of(kind)
        listed = "".join(re.findall(rf"^options of {source}\b.*:\n((?:  .*\n)+)", shown, re.MULTILINE))
        for name, parameter in parameters_of(kind).items():
            line = re.search(rf"^  {name} +(.*)$", listed, re.MULTILINE)
            assert line, (source, name)
            assert line[1].startswith(parameter.given.expected), (source, name)
            assert line[1].endswith(f"; {texts[name]}"), (source, name)
    assert "  every  a whole number from 1 to 2,147,483,647 (default: 1); take each K-th frame\n" in shown
    assert re.search(r"annotations +a string \(required\); JSON file of instances", shown)


def test_options_of_torchvision_come_from_its_constructors(capsys) -> None:
    assert main(["encode", "torchvision:DTD:somewhere", "--help"]) == 0
    assert "  partition  a whole number (default: 1)\n" in capsys.readouterr().out
    emnist = declared_options("EMNIST:DIR")  # passes **kwargs to MNIST, which downloads
    assert list(emnist) == ["split", "train", "download"]
    assert emnist["download"].parsed("yes") is True
    assert declared_options("STL10")["folds"].parsed("3") == 3
    pets = declared_options("OxfordIIITPet")["target_types"]
    assert (pets.parsed("category"), pets.parsed("category+binary-category")) == (
        "category",
        ["category", "binary-category"],
    )
    with pytest.raises(DatasetError) as error:
        open_dataset("torchvision:DTD:/nowhere,partition=x", "train")
    one_line(error, "torchvision:DTD: option partition is 'x', expected a whole number")
    with pytest.raises(DatasetError, match=r"cannot be opened \(Dataset not found"):
        open_dataset("torchvision:DTD:/nowhere,partition=3", "train")
    assert main(["encode", "torchvision:NoSuch", "--help"]) == DatasetError.exit_code

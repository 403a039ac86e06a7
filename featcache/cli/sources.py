"""Help on sources of data: which there are, and the options of those that are named, from their declarations."""

import inspect
import re
from collections.abc import Sequence

from featcache.datasets import DATASETS, SIGNATURES, open_dataset, options_of, source_of
from featcache.datasets.classes import ClassOptions
from featcache.datasets.holdout import Holdout
from featcache.datasets.options import SourceOptions
from featcache.parameters import described, descriptions_of, parameters_of


def sources_help(verb: str, data: Sequence[str]) -> str:
    """The options of the sources in `data`; without one, a line for each source, for which no source is imported."""
    named = [spec for spec in data if source_of(spec)[0] in DATASETS]
    if not named:
        return f"\nsources (`{verb} SOURCE: --help` lists the options of one):\n{_sources()}\n"
    parts = [_of_source(spec) for spec in named]
    parts += [_section("every source:", ClassOptions), _section("every source, for data without splits:", Holdout)]
    return "".join(parts) + "\nOptions follow the argument: table:FILE,label=breed,metadata=region+year (a list).\n"


def _sources() -> str:
    """The table in the docstring of `open_dataset`, and a line for each source that is not in it."""
    rows = re.findall(r"^ +(``.+)", inspect.getdoc(open_dataset) or "", re.MULTILINE)
    lines = [re.sub(r"``| \(`\w+`\)$", "", row) for row in rows]
    for source in DATASETS.keys() - {source_of(line.split()[0])[0] for line in lines}:
        summary, _, _ = (inspect.getdoc(DATASETS[source]) or "").partition("\n")
        lines.append(f"{source}:ARGUMENT  {summary}")
    cells = [re.split("  +", line, maxsplit=1) for line in sorted(lines)]
    return "\n".join(f"  {form:<30}  {summary}" for form, summary in cells)


def _of_source(spec: str) -> str:
    source, argument = source_of(spec)
    if source not in SIGNATURES:
        return _section(f"{source}:", options_of(source))
    kind = argument.partition(":")[0]
    text = described(SIGNATURES[source](kind)) if kind else "  those of the class: name one, torchvision:CIFAR10 --help"
    return f"\noptions of {source}:{kind}{':' if kind else ''}\n{text}\n"


def _section(title: str, kind: type[SourceOptions]) -> str:
    declared = {name: parameter.given for name, parameter in parameters_of(kind).items()}
    return f"\noptions of {title}\n{described(declared, descriptions_of(kind))}\n"

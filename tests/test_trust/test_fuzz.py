"""Parsers under random bytes and random records: a value of the declared kind, or one of our errors."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from featcache.errors import FeatcacheError
from featcache.parameters import check_record, json_value
from featcache.prompts import load_prompt_file, load_templates
from featcache.store.places.s3 import ObjectPath, check_address
from featcache.transfer.foreign import READERS, read_foreign
from ft.recipes import load_recipe
from ft.training.options import FinetuneOptions
from heads import load
from heads.fitted.provenance import Provenance
from heads.sweeps.plan import read_plan

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=200, **QUIET)
@given(text=st.text(max_size=40) | st.binary(max_size=40))
def test_json_is_a_value_or_refused(text: Any) -> None:
    with contextlib.suppress(ValueError):
        json.dumps(json_value(text))


@settings(max_examples=200, **QUIET)
@given(record=JSON)
def test_records_are_checked_or_refused(record: Any) -> None:
    kinds = {"a": int, "b": float | None, "c": list[str], "d": dict[str, Any]}
    with contextlib.suppress(ValueError):
        assert isinstance(check_record(record, kinds, "here", ("a",))["a"], int)


FIELDS = st.sampled_from(list(FinetuneOptions.__dataclass_fields__))


@pytest.mark.nightly
@settings(max_examples=1000, **QUIET)
@given(record=st.dictionaries(FIELDS, JSON, max_size=3))
def test_options_are_options_or_refused(record: dict[str, Any]) -> None:
    with contextlib.suppress(FeatcacheError):
        assert FinetuneOptions.from_dict(record).to_dict()


@pytest.mark.nightly
@settings(max_examples=1000, **QUIET)
@given(record=st.dictionaries(st.sampled_from(["fitted_on", "chosen_on", "encoder", "params", "head"]), JSON))
def test_provenance_is_a_record_or_refused(record: dict[str, Any]) -> None:
    with contextlib.suppress(ValueError):
        found = Provenance.checked(record, "here")
        assert all(isinstance(entry, dict) for entry in [*found.fitted_on, *found.chosen_on])


@pytest.mark.nightly
@settings(max_examples=2000, **QUIET)
@given(text=st.text(max_size=30))
def test_addresses_are_addresses_or_refused(text: str) -> None:
    for parse in (check_address, lambda address: ObjectPath.parse(f"s3://{address}")):
        with contextlib.suppress(FeatcacheError):
            parse(text)


@pytest.mark.nightly
@settings(max_examples=3000, **QUIET)
@given(content=st.binary(max_size=300) | JSON.map(lambda value: json.dumps(value).encode()))
def test_files_of_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    for suffix, parse in {
        ".safetensors": load,
        ".toml": read_plan,
        ".recipe": load_recipe,
        ".json": load_prompt_file,
        ".txt": load_templates,
        **dict.fromkeys(READERS, read_foreign),
    }.items():
        path = Path(folder / f"x{suffix}")
        path.write_bytes(content)
        with contextlib.suppress(FeatcacheError):
            parse(path)

"""The help of every verb, and verbs without a model, load no heavy library."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import NumpyDataset, NumpyEncoder
from small_pictures import write_pictures

from featcache.cli.main import VERBS
from featcache.encoding.images import encode_dataset

HEAVY = ("torch", "open_clip", "zarr", "sklearn", "scipy", "pyarrow", "matplotlib", "numba")
SECONDS = 0.4
SCRIPT = f"""
import sys
from featcache.cli.main import main
try:
    code = main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
print(code, *(name for name in {HEAVY} if name in sys.modules), file=sys.stderr)
"""


def answer(*arguments: str) -> tuple[list[str], float]:
    """Exit code and the heavy libraries that were loaded; CPU time in seconds, the least of up to five runs.

    A busy machine stretches CPU time, so a run that is too slow is repeated; a verb that is too slow is so each time.
    """
    times: list[float] = []
    while len(times) < 5 and min(times, default=SECONDS) >= SECONDS:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        assert done.stdout or "Error: " in done.stderr
    return done.stderr.splitlines()[-1].split(), min(times)


@pytest.mark.parametrize("verb", VERBS)
def test_help_answers_at_once(verb: str) -> None:
    said, seconds = answer(verb, "--help")
    assert said == ["0"]
    assert seconds < SECONDS


def test_verbs_that_need_no_model_answer_at_once(tmp_path: Path) -> None:
    root = ("--root", str(tmp_path))
    store = encode_dataset(NumpyDataset(5), NumpyEncoder(), root=tmp_path).store
    place = str(store.path)
    for words in (("list",), ("info", place), ("verify", place), ("gc",)):
        said, seconds = answer(*words, *root)
        assert said == ["0"], words
        assert seconds < SECONDS, words


def test_missing_weights_are_detected_before_heavy_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("HF_ENDPOINT", "http://127.0.0.1:9"), ("HF_HUB_CACHE", tmp_path), ("TORCH_HOME", tmp_path)):
        monkeypatch.setenv(name, str(value))  # nothing listens there
    data = write_pictures(tmp_path / "pets" / "train", 2).rpartition("/")[0]
    for model in ("timm:vit_tiny_patch16_224", "hf-hub:org/none"):
        assert answer("encode", data, "--split", "train", "--model", model, "--root", str(tmp_path))[0] == ["2"], model

"""Checks of published weights before open_clip is imported, and the errors if they are unavailable."""

import os
import re
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest

from featcache.encoders.published import published

RUN = """
import sys
from featcache.cli.main import main
code = main(sys.argv[1:])
assert not {"torch", "open_clip"} & set(sys.modules), "imported before the hub was asked"
sys.exit(code)
"""


def test_the_parsed_table_equals_open_clips() -> None:
    for model, tag in open_clip.list_pretrained():
        said = open_clip.pretrained.get_pretrained_cfg(model, tag)
        found = published(model, tag)
        if place := said["hf_hub"]:
            assert found == (place.rpartition("/")[0], bool(said.get("quick_gelu")))
        else:
            assert found is None


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (("ViT-B-32-quickgelu", "--pretrained", "openai"), "HF_HUB_OFFLINE is set, .* lacks its files; connect"),
        (("ViT-B/16",), "lacks its files"),
        (("hf-hub:org/none",), "model hf-hub:org/none: HF_HUB_OFFLINE"),
        (("ViT-B-32", "--pretrained", "openai"), "use --model ViT-B-32-quickgelu"),
    ],
)
def test_an_unavailable_model_is_reported_before_torch_is_imported(
    tmp_path: Path, model: tuple[str, ...], said: str
) -> None:
    settings = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    words = ["encode", "digits", "--model", *model, "--root", str(tmp_path)]
    ran = subprocess.run([sys.executable, "-c", RUN, *words], env=settings, capture_output=True, text=True, check=False)
    assert ran.returncode == 2, ran.stderr
    (line,) = ran.stderr.splitlines()
    assert re.search(said, line)

"""``finetune --dry-run``: counts that the run then has, and nothing is written."""

import json
from pathlib import Path
from typing import Any

import pytest
from clip_models import make_model, write_folder
from finetuning import Pictures, options, train
from PIL import Image

from featcache.cli.main import main
from ft.training.plan import plan_finetuning


@pytest.mark.parametrize(
    "changes",
    [{"keep_every": 1, "steps": 6, "average": "ema"}, {"objective": "contrastive", "accumulate": 2}, {"lora_rank": 2}],
)
def test_planned_counts_equal_those_of_the_run(changes: dict[str, Any], tmp_path: Path) -> None:
    name = write_folder(tmp_path / "model", make_model())
    plan = plan_finetuning(Pictures(), None, name, None, options(**changes), device="cpu", root=tmp_path / "stores")
    assert not (tmp_path / "stores").exists()
    result = train(tmp_path / "run", name, **changes)
    assert plan.updates == result.steps
    assert plan.images_to_read == 8 * result.steps
    written = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*model.safetensors"))
    written += (tmp_path / "run" / "resume.safetensors").stat().st_size
    assert plan.bytes_to_write == pytest.approx(written, rel=0.15)  # headers, and heads of their own files
    assert plan.seconds > 0


@pytest.mark.parametrize("dry", [["--dry-run"], []])
@pytest.mark.parametrize("val", [[], ["--val", "table:tags.csv,labels=tags:val"]])
def test_multi_label_data_are_refused_in_one_line(
    dry: list[str], val: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (4, 4)).save("a.png")
    Path("tags.csv").write_text("path,tags\na.png,cat|dog\n")
    data = "digits" if val else "table:tags.csv,labels=tags"
    words = ["finetune", data, "--out", "run", "--root", "s", "--steps", "1", *val, *dry]
    assert main(words) != 0
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "is multi-label, and fine-tuning takes one label per image" in line
    assert not Path("run").exists()


def test_the_command_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["finetune", "digits", "--val", "digits:val", "--out", str(tmp_path / "run"), "--root", str(tmp_path / "s")]
    words += ["--steps", "3", "--batch-size", "4", "--augment", "none", "--workers", "1", "--dry-run"]
    assert main([*words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["images"], plan["validation_images"], plan["images_to_read"]) == (1000, 297, 3 * 4 + 297)
    assert main(words) == 0
    assert "digits/train: 1,000 images, 3 updates of 4; would read 309 images" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())

"""``featcache generate``: the tree, its pictures, resuming, several processes, and refusals."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusion_models import TOKENS, Draft, draft, write_diffusion_model
from PIL import Image

from featcache.cli.main import main
from featcache.datasets import open_dataset
from featcache.encoding.options import Share
from featcache.errors import FeatcacheError, MismatchError, PromptError
from featcache.prompts.imagenet import imagenet_names, imagenet_wnids
from featcache.store import open_image_store
from featcache.store.places import local
from ft.generation import GenerateOptions, generate, load_style
from ft.generation.plan import Plan

SMALL = ("--height", "16", "--width", "16", "--steps", "2", "--size", "32", "--quiet")
HERE = Path(__file__)
PATHS = os.pathsep.join(map(str, (HERE.parents[2], HERE.parents[3])))  # tests, then this checkout


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_diffusion_model(tmp_path_factory.mktemp("diffusion") / "sd")


@pytest.fixture
def classes(tmp_path: Path) -> str:
    path = tmp_path / "names.txt"
    path.write_text("owl\nant\n")
    return str(path)


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(np.int64)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model: str) -> Path:
    """Three images of each of two classes, drawn by the command line."""
    base = tmp_path_factory.mktemp("made")
    (base / "names.txt").write_text("owl\nant\n")
    words = ["generate", str(base / "names.txt"), "--out", str(base / "out"), "--model", model, "--images", "3"]
    assert main([*words, "--batch-size", "4", *SMALL]) == 0
    return base / "out"


def test_the_image_tree_matches_regft_and_can_be_encoded(made: Path, capsys: Any) -> None:
    assert list(pictures(made / "train")) == [f"{name}/0001_000{i}.png" for name in ("ant", "owl") for i in range(3)]
    assert pixels(made / "train/owl/0001_0000.png").shape == (32, 32, 3)
    capsys.readouterr()
    assert main(["encode", f"imagefolder:{made}", "--split", "train", "--quiet", "--json"]) == 0
    store = open_image_store(json.loads(capsys.readouterr().out)[0]["store"])
    assert tuple(store.classnames) == ("owl", "ant")  # the list's order, not the alphabet's
    assert store.labels.tolist() == [1, 1, 1, 0, 0, 0]


@pytest.mark.nightly
def test_generated_images_fine_tune_a_model(tmp_path: Path, model: str, classes: str) -> None:
    out, run = str(tmp_path / "made"), str(tmp_path / "run")
    for split, images in (("train", "4"), ("val", "2")):
        words = ["generate", classes, "--out", out, "--split", split, "--model", model, "--images", images, *SMALL]
        assert main(words) == 0
    words = ["finetune", f"imagefolder:{out}", "--val", f"imagefolder:{out}:val", "--recipe", "regft", "--out", run]
    assert main([*words, "--steps", "2", "--batch-size", "4", "--model", "tiny", "--quiet"]) == 0
    assert (tmp_path / "run" / "best_head.safetensors").is_file()


def test_pictures_are_those_of_the_pipeline_from_the_seeds_of_the_plan(made: Path, model: str) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    plan = Plan("train", [("owl", "owl"), ("ant", "ant")], ["a photo of a {}."], 3, 1, 16)
    assert {plan[i].path: plan[i].prompt for i in range(len(plan))} == {
        f"{name}/0001_000{i}.png": f"a photo of a {name}." for i in range(3) for name in ("owl", "ant")
    }
    for request in plan.batch(0)[::2]:
        noise = torch.Generator().manual_seed(request.seed)
        drawn = pipeline(
            request.prompt, height=16, width=16, guidance_scale=5.0, num_inference_steps=2, generator=noise
        ).images[0]
        expected = np.asarray(drawn.resize((32, 32), Image.Resampling.BICUBIC)).astype(np.int64)
        assert np.abs(pixels(made / "train" / request.path) - expected).max() <= 1


def test_no_two_images_share_noise(tmp_path: Path) -> None:
    plans = [
        Plan(split, [("a", "x"), ("b", "x")], ["{}", "the {}"], 5, seed, 4)
        for split in ("train", "val")
        for seed in (1, 2)
    ]
    seeds = [plan[i].seed for plan in plans for i in range(len(plan))]
    assert len(set(seeds)) == len(seeds) == 80
    assert max(seeds) < 2**63


def test_images_do_not_depend_on_batch_size_or_order(tmp_path: Path) -> None:
    for size in (1, 4, 100):
        assert draft(tmp_path / str(size), batch_size=size).made == 12
    draft(tmp_path / "two", share=Share(1, 3))
    first, *others = [pictures(tmp_path / name / "train") for name in ("1", "4", "100", "two")]
    assert len(first) == 12
    assert all(other == first for other in others)


def test_a_second_run_draws_missing_images_and_a_larger_number_adds_more(tmp_path: Path) -> None:
    draft(tmp_path)
    before = pictures(tmp_path / "train")
    lost = tmp_path / "train/owl/0002_0001.png"
    lost.unlink()
    kept = tmp_path / "train/ant/0001_0000.png"
    os.utime(kept, (1, 1))
    again = draft(tmp_path)
    assert (again.made, again.there, again.total) == (1, 12, 12)
    assert pictures(tmp_path / "train") == before
    more = draft(tmp_path, images=5)
    assert (more.made, more.total) == (8, 20)
    assert before.items() <= pictures(tmp_path / "train").items()
    assert kept.stat().st_mtime == 1
    assert draft(tmp_path, images=5).made == 0


def test_a_run_stopped_at_any_step_leaves_whole_images_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(BaseException):
        pass

    stops = 0
    while True:
        left = [4 + 3 * stops]

        def step(_: str, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Stop

        monkeypatch.setattr(local, "after_step", step)
        try:
            draft(tmp_path / "stopped")
            break
        except Stop:
            stops += 1
            for path in (tmp_path / "stopped").rglob("*.png"):
                Image.open(path).load()
    monkeypatch.undo()
    draft(tmp_path / "whole")
    assert stops > 5
    assert pictures(tmp_path / "stopped" / "train") == pictures(tmp_path / "whole" / "train")
    assert len(open_dataset(f"imagefolder:{tmp_path / 'stopped'}", "train").index) == 12  # leftovers are no images


def test_shards_draw_only_their_own_batches(tmp_path: Path) -> None:
    parts = [draft(tmp_path, share=Share(index, 2, only=True)) for index in (1, 0)]
    assert [(part.made, part.there) for part in parts] == [(4, 4), (8, 12)]


def test_processes_share_batches_and_take_over_from_killed_ones(tmp_path: Path) -> None:
    claims = tmp_path / ".generate" / "claims"
    claims.mkdir(parents=True)
    (claims / "train-1-0").write_text(f"{local.HOST}-999999999")  # no such process
    script = "from pathlib import Path\nfrom diffusion_models import Draft, draft\n"
    script += f"print(draft(Path({str(tmp_path)!r}), Draft(0.1), images=6, batch_size=1).made)"
    env = os.environ | {"PYTHONPATH": PATHS, "FEATCACHE_FSYNC": "0", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script], env=env | {"RANK": str(rank), "WORLD_SIZE": "2"}, stdout=subprocess.PIPE
        )
        for rank in range(2)
    ]
    made = [int(rank.communicate(timeout=120)[0]) for rank in ranks]
    assert len(pictures(tmp_path / "train")) == 24
    assert sum(made) == 24
    assert not list(claims.iterdir())


def test_claims_that_a_killed_process_left_on_finished_images_are_removed(tmp_path: Path) -> None:
    draft(tmp_path)
    claim = tmp_path / ".generate" / "claims" / "train-1-0"
    claim.parent.mkdir(parents=True, exist_ok=True)
    claim.write_text(f"{local.HOST}-999999999")  # it had drawn its images, and not given the claim back
    assert draft(tmp_path).made == 0
    assert not claim.exists()


def test_imagenet_folders_are_wordnet_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "synced", False)
    classes = list(zip(imagenet_wnids(), imagenet_names(), strict=True))
    options = GenerateOptions(images=1, size=4, height=8, width=8, batch_size=500)
    assert generate(classes, ["a {}."], Draft(), tmp_path, options=options).made == 1000
    for source in ("imagenet", "imagefolder"):
        index = open_dataset(f"{source}:{tmp_path}", "train").index
        assert list(index.classnames) == list(imagenet_names())  # two names occur twice
        assert index.ids[index.labels.tolist().index(744)] == f"{imagenet_wnids()[744]}/0001_0000.png"


def test_regfts_style_files_are_read(tmp_path: Path) -> None:
    entry = {"template": "a {}.", "classnames": ["F-16A/B", "DR-400"], "save_subdir": ["n1", "n2"]}
    path = tmp_path / "prompt_styles.json"
    path.write_text(json.dumps({"imagenet": entry, "fgvc": {k: entry[k] for k in ("template", "classnames")}}))
    for name, folders in (("imagenet", ["n1", "n2"]), ("fgvc", ["DR-400", "F-16A_B"])):
        style = load_style(name, path)
        options = GenerateOptions(images=1, height=8, width=8, size=8)
        generate(style.classes, style.templates, Draft(), tmp_path / name, options=options)
        assert sorted(found.name for found in (tmp_path / name / "train").iterdir()) == folders
        assert open_dataset(f"imagefolder:{tmp_path / name}", "train").index.classnames == ("F-16A/B", "DR-400")


def test_the_shipped_styles_fill_one_class_name() -> None:
    from ft.generation.styles import STYLES

    for name in json.loads(STYLES.read_text()):
        assert all(template.count("{}") == 1 for template in load_style(name).templates)


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"seed": 2}, "seed 1, got 2"), ({"steps": 7}, "steps 50, got 7"), ({"size": 9}, "size 8, got 9")],
)
def test_other_options_for_the_same_tree_are_refused(tmp_path: Path, changes: dict[str, int], named: str) -> None:
    draft(tmp_path)
    before = pictures(tmp_path)
    with pytest.raises(MismatchError, match=named):
        draft(tmp_path, **changes)
    with pytest.raises(MismatchError, match="precision 'fp32', got 'fp16'"):
        draft(tmp_path, Draft(precision="fp16"))
    with pytest.raises(MismatchError, match="lists other classes"):
        generate([("owl", "owl")], ["a {}."], Draft(), tmp_path)
    assert pictures(tmp_path) == before


def test_another_model_is_refused(tmp_path: Path, model: str, classes: str, capsys: Any) -> None:
    other = write_diffusion_model(tmp_path / "other", seed=1)
    for name, code in ((model, 0), (other, 5)):
        words = ["generate", classes, "--out", str(tmp_path / "made"), "--model", name, "--images", "1", *SMALL]
        assert main(words) == code
    assert "another --out" in capsys.readouterr().err


Words = Callable[[Path], list[str]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (lambda base: [], "names no classes; expected CLASSES"),
        (lambda base: ["nothing.txt"], "no such file"),
        (lambda base: ["digits", "--style", "oil"], "no style 'oil'; expected one of imagenet"),
        (lambda base: ["digits", "--styles", str(base)], "prompt-style file"),
        (lambda base: ["digits", "--images", "0"], "--images: '0', expected a whole number from 1"),
        (lambda base: ["digits", "--guidance-scale", "-1"], "--guidance-scale: '-1', expected a number from 0"),
        (lambda base: ["digits", "--guidance-scale", "nan"], "--guidance-scale: 'nan', expected a number from 0"),
        (lambda base: ["digits", "--height", "13"], "expected multiples of 8"),
        (lambda base: ["digits", "--split", "../up"], "expected a folder name"),
        (lambda base: ["digits", "--model", "/no/such/folder"], "no such folder; expected a folder saved by diffusers"),
        (lambda base: ["digits", "--model", str(base / "pickled")], "safetensors"),
        (lambda base: ["digits", "--model", str(base)], "model_index.json"),
        (lambda base: [str(base / "long.txt")], f"tokens, the model reads {TOKENS}; shorten it"),
        (lambda base: [str(base / "same.txt")], "have one folder, 'a_b'"),
        (lambda base: [str(base / "dots.txt")], "is not a valid folder name"),
    ],
)
def test_bad_input_is_one_line(
    words: Words, said: str, tmp_path: Path, model: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "long.txt").write_text("owl\n" + "x" * TOKENS + "\n")
    (tmp_path / "same.txt").write_text("a/b\na_b\n")
    (tmp_path / "dots.txt").write_text("..\n")
    if "pickled" in str(words(tmp_path)):
        write_diffusion_model(tmp_path / "pickled", safe=False)
    capsys.readouterr()
    assert main(["generate", "--out", "made", "--model", model, "--images", "1", "--quiet", *words(tmp_path)]) == 2
    errors = capsys.readouterr().err
    assert said in errors
    assert len(errors.splitlines()) == 1
    assert not list(tmp_path.glob("made/*/*"))


def test_an_unreachable_hub_is_reported_before_diffusers_is_loaded(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delitem(sys.modules, "diffusers", raising=False)
    assert main(["generate", "digits", "--out", str(tmp_path / "made"), "--model", "org/none", "--images", "1"]) == 2
    assert "--model org/none: HF_HUB_OFFLINE is set" in capsys.readouterr().err
    assert "diffusers" not in sys.modules


def test_names_and_templates_are_checked_before_anything_is_written(tmp_path: Path) -> None:
    for classes, templates in (([], ["{}"]), ([("a", "a")], []), ([("a", "a")], ["no placeholder"])):
        with pytest.raises(PromptError):
            generate(classes, templates, Draft(), tmp_path / "made")
    with pytest.raises(FeatcacheError, match="batch_size"):
        GenerateOptions(batch_size=0)
    assert not (tmp_path / "made").exists()

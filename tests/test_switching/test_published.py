"""Published figures: what the files hold, where they are found, and measured values beside them."""

import json
import tomllib
from pathlib import Path

import pytest

from featcache.cli.main import main
from featcache.errors import HeadError
from heads.report.against import (
    METHODS,
    compare_published,
    comparison_text,
    method_of,
    plain_model,
    published_figures,
    read_figures,
)

ROOT = Path(__file__).parents[2]
QUICK = "ViT-B-16-quickgelu/openai"


def values(file, dataset, metric="top1", **wanted):
    """Published values of a data set, in percent or nats, from the files themselves."""
    found = []
    for table in tomllib.loads((ROOT / "benchmarks" / "published" / f"{file}.toml").read_text())["table"]:
        for row in table["rows"]:
            full = {**table, **row}
            names = full["datasets"]
            if dataset in names and all(full.get(key) == value for key, value in wanted.items()):
                place = names.index(dataset)
                found += full.get(metric, [])[place : place + 1]
    return found


@pytest.mark.parametrize(
    ("file", "dataset", "metric", "wanted", "expected"),
    [
        ("lipsum-ft", "domainnet-clipart", "top1", {"method": "zero_shot"}, [65.57]),
        ("lipsum-ft", "domainnet-infograph", "nll", {"method": "finetuned"}, [3.061]),
        ("lipsum-ft", "imagenet-r", "nll", {"method": "zero_shot"}, [0.9267]),
        ("lipsum-ft", "imagenet-sketch", "top1", {"name": "Lipsum-FT"}, [51.48, 51.4]),
        ("giung2-dev", "imagenet-a", "top1", {"model": "ViT-B/32", "method": "linear"}, [26.27]),
        ("giung2-dev", "imagenet-v2", "top1", {"settings": {"lr": 3e-2, "wd": 1e-3}}, [69.35]),
        ("wise-ft", "imagenet-r", "top1", {"alpha": 0.5, "model": "ViT-B/16", "method": "wise", "shots": None}, [78.7]),
        ("wise-ft", "objectnet", "top1", {"alpha": 0.25}, [55.3]),
        ("wise-ft", "imagenet-a", "top1", {"model": "ViT-L/14@336px", "alpha": 1.0}, [76.1, 65.4]),
        ("zero-shot", "eurosat", "top1", {}, [55.94]),
        ("linear-probe", "imagenet", "top1", {}, [85.4]),
        ("robust-ft", "imagenet-v2", "top1", {"name": "FLYP"}, [72.8]),
        ("mnist-example", "MNIST_test_zero", "top1", {"model": "ViT-B/16", "method": "finetuned"}, [82.0]),
        ("transferlearning", "officehome-Real World", "top1", {"model": "ViT-B/16"}, [89.90]),
        ("transferlearning", "terraincognita-location_100", "top1", {"model": "ViT-B/16"}, [51.17]),
        ("transferlearning", "domainnet-sketch", "top1", {"model": "ViT-B/32"}, [58.53]),
        ("transferlearning", "imagenet-r", "top1", {"model": "RN50"}, [56.22]),
        ("transferlearning", "visda-validation", "top1", {"model": "ViT-L/14@336px"}, [86.28]),
    ],
)
def test_files_hold_the_figures_of_their_sources(file, dataset, metric, wanted, expected):
    assert values(file, dataset, metric, **wanted) == expected


def test_every_figure_says_where_it_comes_from_and_how_it_was_made():
    figures = published_figures()
    assert len(figures) > 600
    for figure in figures:
        assert all((figure.source, figure.preprocessing, figure.protocol, figure.model, figure.title))
        assert figure.method in METHODS
        assert figure.tolerance > 0
        assert 0 < figure.value <= (1 if figure.metric != "nll" else 10)
        assert "memory" not in figure.source


def test_averages_of_transferlearning_are_means_of_its_columns():
    """Its figures for Office-31 average two domains of three; the file says so."""
    figures = [figure for figure in published_figures() if figure.file == "transferlearning"]
    single = {(f.model, f.datasets[0]): f.value for f in figures if len(f.datasets) == 1}
    averages = [figure for figure in figures if len(figure.datasets) > 1]
    assert len(averages) == 9 * 6
    for figure in averages:
        mean = sum(single[figure.model, name] for name in figure.datasets) / len(figure.datasets)
        assert figure.value == pytest.approx(mean, abs=1.1e-4), figure


def test_a_wheel_holds_the_figures_and_the_templates():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["*"]
    package = ROOT / "heads" / "report"  # patterns are relative to a package
    packed = {path.relative_to(package).as_posix() for pattern in patterns for path in package.glob(pattern)}
    expected = {f"published/{path.name}" for path in (ROOT / "benchmarks/published").glob("*.toml")}
    assert len(expected) >= 9
    assert expected | {"templates/page.html", "templates/page.css", "templates/page.js"} <= packed


def row(head="zero_shot", encoder=QUICK, **values):
    named = {key.replace("__", "-").replace("_top1", ":top1").replace("_nll", ":nll"): v for key, v in values.items()}
    return {"head": head, "encoder": encoder, **named}


def found(rows, against="published", **options):
    return {(c.figure.file, c.dataset, c.figure.metric): c for c in compare_published(rows, against, **options)}


def test_differences_are_measured_minus_published_and_flagged_beyond_tolerance():
    compared = found([row(imagenet_top1=0.6801, imagenet_nll=1.17)])
    assert compared["giung2-dev", "imagenet", "top1"].difference == pytest.approx(0.6801 - 0.6834)
    assert compared["giung2-dev", "imagenet", "top1"].beyond  # 0.33 of 0.2 points
    assert not compared["giung2-dev", "imagenet", "nll"].beyond  # 0.002 of 0.01
    assert not compared["wise-ft", "imagenet", "top1"].beyond  # 0.29 of 0.6


def test_another_preprocessing_is_named_and_not_flagged():
    plain = found([row(imagenet__r_top1=0.777)])
    assert plain["lipsum-ft", "imagenet-r", "top1"].other == "preprocessing"
    assert not plain["lipsum-ft", "imagenet-r", "top1"].beyond  # though 1.35 points off
    cropped = found([row(encoder=f"{QUICK}/central-crop", imagenet__r_top1=0.777)])
    assert cropped["lipsum-ft", "imagenet-r", "top1"].beyond
    assert cropped["giung2-dev", "imagenet-r", "top1"].other == "preprocessing"


def test_prompts_that_differ_are_named_where_they_are_known():
    compared = found([row(imagenet__r_top1=0.777)], prompts="openai-imagenet")
    assert compared["transferlearning", "imagenet-r", "top1"].other == "prompts"


@pytest.mark.parametrize(
    ("ours", "method"),
    [
        ({"head": "zero_shot:b16"}, ("zero_shot", 0.0)),
        ({"head": "zero_shot+logistic", "alpha": 0.25}, ("linear", 0.25)),
        ({"head": "wise", "alpha": 0.5}, ("wise", 0.5)),
        ({"head": "ridge"}, ("linear", 1.0)),
        ({"head": "finetuned"}, ("finetuned", 1.0)),
        ({"head": "knn"}, (None, 1.0)),
        ({"alpha": 0.3, "freeze_encoder": True, "results_db": "r"}, ("linear", 0.3)),
    ],
)
def test_rows_are_matched_to_published_methods(ours, method):
    assert method_of(ours) == method


def test_rows_are_compared_at_equal_alpha_and_equal_shots():
    rows = [row("wise", "ViT-B/16", imagenet_top1=0.82) | {"alpha": 0.5}]
    (only,) = compare_published(rows)
    assert (only.figure.value, only.figure.name) == (0.817, "WiSE-FT, end to end")
    (few,) = compare_published([row("zero_shot+ridge", imagenet_top1=0.73) | {"alpha": 0.5, "shots": 16}])
    assert few.figure.value == 0.7302


def test_the_model_can_be_named_if_the_rows_do_not_name_it():
    rows = [row("finetuned", "best", imagenet_top1=0.83)]
    assert compare_published(rows) == []
    assert "model: best" in comparison_text([], rows)
    assert {c.figure.file for c in compare_published(rows, "published:ViT-B/16,lipsum-ft")} == {"lipsum-ft"}
    with pytest.raises(HeadError, match="'nobody' is none of giung2-dev"):
        compare_published(rows, "published:nobody")


def test_other_weights_are_not_openai_s():
    assert plain_model("ViT-B-16/laion2b_s34b_b88k") != plain_model("ViT-B/16")
    assert compare_published([row(encoder="ViT-B-16/laion2b_s34b_b88k", imagenet_top1=0.7)]) == []


def test_a_file_of_your_own_figures(tmp_path):
    table = {"title": "t", "source": "me", "model": "tiny", "method": "zero_shot", "preprocessing": "p"}
    text = 'system = "mine"\n[[table]]\nprotocol = "x"\ntolerance = { top1 = 1.0 }\ndatasets = ["digits", "b"]\n'
    text += "".join(f'{key} = "{value}"\n' for key, value in table.items())
    path = tmp_path / "mine.toml"
    path.write_text(text + 'rows = [{ top1 = ["", 50.0], average = 60.0 }]\n')
    assert [(f.datasets, f.value) for f in read_figures(path)] == [(("b",), 0.5), (("digits", "b"), 0.6)]
    (b, mean) = compare_published([row(encoder="tiny", digits_top1=0.9, b_top1=0.515)], str(path))
    assert (b.beyond, b.dataset) == (True, "b")
    assert mean.measured == pytest.approx(0.7075)
    path.write_text(text.replace("zero_shot", "magic") + "rows = [{ top1 = [1.0] }]\n")
    with pytest.raises(HeadError, match="method is 'magic'"):
        read_figures(path)


def test_report_and_its_json_show_the_comparison(tmp_path, capsys):
    results = tmp_path / "results.jsonl"
    results.write_text(json.dumps(row(imagenet_top1=0.7)) + "\n")
    assert main(["report", str(results), "--against", "published:zero-shot"]) == 0
    shown = capsys.readouterr().out
    assert "70.00      68.35       +1.65" in shown
    assert "2 of 2 differences in comparable settings are beyond their tolerance" in shown
    assert main(["report", str(results), "--against", "published:zero-shot", "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert [one["published"] for one in record["published"]] == [0.6835, 0.6834]

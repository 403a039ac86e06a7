"""The verbs fit, sweep and leaks on real stores of the embedded model, as a user runs them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import heads
from featcache.cli.main import main
from heads.sweeps.plan import PAPERS


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits and their class names, encoded once for this file."""
    root = tmp_path_factory.mktemp("root")
    common = ["--root", str(root), "--quiet"]
    assert main(["encode", "digits", "--split", "train", "val", "test", *common]) == 0
    assert main(["text", "digits", "--templates", "digits", *common]) == 0
    return root


@pytest.fixture
def cli(root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Run a verb; returns (exit code, JSON of stdout, text of stderr)."""
    monkeypatch.setenv("FEATCACHE_ROOT", str(root))
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()

    def run(*arguments: str) -> tuple[int, Any, str]:
        code = main([*arguments, "--json"])
        captured = capsys.readouterr()
        return code, json.loads(captured.out) if captured.out else None, captured.err

    return run


TRANSDUCTIVE = sorted(name for name, kind in heads.HEADS.items() if kind.transductive)


@pytest.mark.parametrize(
    "head",
    [
        name
        for name, kind in sorted(heads.HEADS.items())
        if name not in ("zero_shot", "lp_plus_plus", "logistic", "clap")
        and not kind.multilabel
        and not kind.transductive
    ],
)
def test_every_head_fits_and_is_judged_from_the_command_line(cli: Any, head: str) -> None:
    texts = ["texts/digits@tiny"] if heads.HEADS[head].takes_texts else []
    assert cli("fit", head, "digits/train@tiny", *texts, "-o", "h.safetensors")[0] == 0
    code, rows, error = cli("evaluate", "h.safetensors", "--on", "digits/test")
    assert code == 0, error
    assert rows[0]["digits:top1"] > 0.9


@pytest.mark.parametrize("head", TRANSDUCTIVE)
def test_a_transductive_head_predicts_only_the_rows_it_was_fitted_on(cli: Any, head: str) -> None:
    assert cli("fit", head, "digits/test@tiny", "texts/digits@tiny", "-o", "h.safetensors")[0] == 0
    code, rows, error = cli("evaluate", "h.safetensors", "--on", "digits/test")
    assert code == 0, error
    assert rows[0]["protocol"] == "transductive"
    assert rows[0]["digits:top1"] > (0.9 if head != "em_dirichlet" else 0.5)  # which expects few of the classes
    code, _, error = cli("evaluate", "h.safetensors", "--on", "digits/train")
    assert code == 2
    assert "is transductive: it predicts only the" in error


def test_the_file_of_a_linear_head_can_replace_texts(cli: Any) -> None:
    """The same probabilities from the text store and from the zero-shot head's file; a few-shot head may come first."""
    assert cli("fit", "zero_shot", "texts/digits", "-o", "zs.safetensors")[0] == 0
    test, found = "digits/test@tiny", []
    for texts in ("texts/digits@tiny", "zs.safetensors"):
        assert cli("fit", "transclip", test, texts, "-o", "h.safetensors")[0] == 0
        found.append(heads.load("h.safetensors").table)
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)
    assert cli("fit", "gda", "digits/train@tiny", "zs.safetensors", "-o", "gda.safetensors")[0] == 0
    assert cli("fit", "transclip", test, "gda.safetensors", "-o", "both.safetensors")[0] == 0
    assert "train" in [entry.get("split") for entry in heads.load("both.safetensors").provenance.fitted_on]
    for wrong, said in (
        (("zero_shot", "zs.safetensors"), "is made from a text store"),
        (("ridge", "digits/train@tiny", "zs.safetensors"), "zs.safetensors is a head; ridge fits from one store"),
        (("gda", "digits/train@tiny", "zs.safetensors", "texts/digits@tiny"), "not both"),
    ):
        code, _, error = cli("fit", *wrong, "-o", "x.safetensors")
        assert (code, said in error) == (2, True)


def test_a_prior_comes_from_texts_or_a_file(cli: Any, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--set", "C=1e-9", "--set", "fit_intercept=false")  # so strong a penalty that the prior is all there is
    assert main(["fit", "logistic", "digits/train", "--prior", "texts/digits", "-o", "a.safetensors", *few]) == 0
    assert "prior=zero_shot" in capsys.readouterr().out
    assert cli("fit", "zero_shot", "texts/digits", "-o", "zs.safetensors")[0] == 0
    assert cli("fit", "logistic", "digits/train", "--prior", "zs.safetensors", "-o", "b.safetensors", *few)[0] == 0
    assert cli("fit", "ridge", "digits/train", "--prior", "none.safetensors", "-o", "c.safetensors")[0] == 2
    _, rows, _ = cli("evaluate", "a.safetensors", "b.safetensors", "zs.safetensors", "--on", "digits/test")
    assert rows[0]["digits:nll"] == pytest.approx(rows[1]["digits:nll"], rel=1e-6)
    assert rows[0]["digits:top1"] == pytest.approx(rows[2]["digits:top1"], abs=0.003)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fit", "tip_adapter", "digits/train", "-o", "x"), "needs a text store"),
        (("fit", "ridge", "digits/train", "texts/digits", "-o", "x"), "a store of texts"),
        (("fit", "ridge", "texts/digits", "-o", "x"), "texts/digits is a store of texts; ridge fits from one store"),
        (("fit", "rigde", "digits/train", "-o", "x"), "unknown head 'rigde'; expected one of "),
        (("fit", "rigde", "digits/train", "-o", "x"), "; did you mean ridge?"),
        (("fit", "ridge", "digits/train"), "required: -o/--output; see `featcache fit --help`"),
        (("evaluate", "x", "--frob"), "see `featcache evaluate --help`"),
        (("finetune", "digits"), "required: -o/--out; see `featcache finetune --help`"),
        (("fit", "zero_shot", "digits/train", "-o", "x"), "a store of images"),
        (("fit", "ridge", "digits/train", "digits/val", "-o", "x"), "one store of images, got 2"),
        (("fit", "knn", "digits/train", "--prior", "texts/digits", "-o", "x"), "takes no prior"),
        (("fit", "zero_shot", "texts/digits", "--select", "digits/val", "-o", "x"), "nothing to choose"),
        (
            ("fit", "ridge", "none/train", "--set", 'alphas="x"', "-o", "x"),
            "alphas is 'x', expected a number above 0",
        ),
        (("fit", "logistic", "none/train", "--set", "C={}", "-o", "x"), "logistic.C is {}, expected a number above 0"),
        (
            ("fit", "logistic", "none/train", "--set", 'metric="foo"', "-o", "x"),
            "logistic.metric is 'foo', expected 'top1' or 'nll'",
        ),
        (("sweep", "knn", "--grid", "knn.n_neighbors=[0]", "--on", "x"), "knn.n_neighbors is 0, expected a whole"),
        (("sweep", "ridge", "--on", "digits/test"), "name a train store"),
        (("sweep", "ridge", "--train", "digits/train", "--on", "digits/test", "--shots", "few"), "--shots few"),
        (("sweep", "ridge", "--grid", "knn.n_neighbors=[1]", "--on", "x"), "with one of the heads ridge"),
        (
            ("sweep", "ridge", "--grid", "ridge.alpha=[1]", "--on", "x"),
            "ridge.NAME=VALUE with one of add_prior, alphas,",
        ),
        (("sweep", "--file", "none.toml"), "cannot be read as a sweep"),
        (("sweep", "--file", "none.toml", "--data", "digits"), "leave heads and stores out"),
        (("sweep", "ridge", "--set", "ridge.prior='texts'", "--on", "x"), "is not a JSON value; quote strings twice"),
        (("sweep", "ridge", "--set", 'ridge.prior="texts"', "--data", "digits"), "name a text store"),
        (("sweep", "knn", "--set", 'knn.prior="texts"', "--data", "digits"), "knn.NAME=VALUE with one of"),
        (("sweep", "ridge", "--data", "a", "b", "--train", "c/train", "--on", "c/test"), "hold no {}"),
        (("leaks", "digits/train", "texts/digits"), "a store of texts"),
    ],
)
def test_impossible_requests_are_one_line_errors(cli: Any, arguments: tuple[str, ...], message: str) -> None:
    code, _, error = cli(*arguments)
    assert code == 2
    assert len(error.splitlines()) == 1
    assert message in json.loads(error.splitlines()[-1])["message"]


def test_sweep_from_flags_and_from_a_file_are_one_sweep(cli: Any, tmp_path: Path) -> None:
    flags = ["--train", "digits/train", "--select", "digits/val", "--on", "digits/test", "--texts", "texts/digits"]
    flags += ["--shots", "1", "4", "--seeds", "0", "1", "--models", "tiny", "--set", "knn.temperature=0.1"]
    code, rows, error = cli("sweep", "zero_shot", "ridge", "knn", *flags)
    assert code == 0, error
    assert len(rows) == 1 + 2 * 4
    assert error.count("\n") == 9
    (tmp_path / "sweep.toml").write_text(
        'shots = [1, 4]\nseeds = [0, 1]\nmodels = ["tiny"]\n'
        '[[data]]\ntrain = "digits/train"\nselect = "digits/val"\non = ["digits/test"]\ntexts = ["texts/digits"]\n'
        '[[head]]\nname = "zero_shot"\n[[head]]\nname = "ridge"\n[[head]]\nname = "knn"\nset = { temperature = 0.1 }\n'
    )
    code, again, error = cli("sweep", "--file", "sweep.toml", "--quiet")
    assert (code, error) == (0, "")
    assert again == rows
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == len(rows)


def test_sweeps_of_several_data_sets_priors_and_fewer_rows_by_flags(cli: Any) -> None:
    flags = ["--data", "test", "val", "--train", "digits/train", "--on", "digits/{}", "--texts", "texts/digits"]
    flags += ["--shots", "200", "--allow-fewer", "--grid", 'ridge.prior=["zero","texts"]', "--alphas", "0", "0.5", "1"]
    code, rows, error = cli("sweep", "ridge", *flags, "--models", "tiny")
    assert code == 0, error
    assert [row["head"] for row in rows] == ["ridge", "zero_shot+ridge"] * 4
    assert [row["setting"]["prior"] for row in rows] == ["zero", "zero", "texts", "texts"] * 2
    _, (on_val,), _ = cli("sweep", "ridge", "--train", "digits/train", "--on", "digits/val")
    assert rows[4]["digits:nll"] == pytest.approx(on_val["digits:nll"], rel=1e-6)
    assert rows[0]["digits:nll"] != pytest.approx(on_val["digits:nll"], rel=1e-3)
    assert {row["train_rows"] for row in rows} == {1000}  # of a thousand rows no digit has 200
    assert {row["params"]["selection"] for row in rows[1::2]} == {"folds"}


def test_a_paper_that_chooses_on_test_is_named_by_stderr_and_by_every_row(cli: Any, tmp_path: Path) -> None:
    flags = ["--data", "digits", "--select", "{}/val", "--texts", "texts/digits", "--shots", "2", "--seeds", "0", "1"]
    flags += ["--set", "tip_adapter.alphas=[1,5]", "--set", "tip_adapter.betas=[1,5.5]"]
    code, rows, error = cli("sweep", "tip_adapter", "zero_shot", *flags, "--reproduce-paper", "tip-adapter")
    assert code == 0, error
    assert error.splitlines()[0] == f"leak reintroduced on purpose: {PAPERS['tip-adapter']}"
    assert [row["leak"] for row in rows] == [PAPERS["tip-adapter"]] * 3
    assert [row["chosen_on"][-1]["split"] for row in rows[:2]] == ["test", "test"]
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 3


def test_the_table_of_a_papers_sweep_names_the_split_it_was_picked_on(
    cli: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", "ridge", "--data", "digits", "--shots", "1", "--reproduce-paper", "regft", "--quiet"]) == 0
    assert f"picked by top1 on the first reported split ({PAPERS['regft']})" in capsys.readouterr().out


def test_info_shows_where_a_head_comes_from(cli: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("fit", "ridge", "digits/train", "--select", "digits/val", "-o", "ridge.safetensors")[0] == 0
    code, record, error = cli("info", "ridge.safetensors")
    assert code == 0, error
    assert (record["head"], record["chosen_on"][0]["split"]) == ("ridge", "val")
    assert main(["info", "ridge.safetensors"]) == 0
    said = capsys.readouterr().out
    assert "fitted on    digits/train\n  chosen on    digits/val\n" in said
    assert f"alpha        {record['params']['alpha']}" in said
    Path("other.safetensors").write_bytes(b"x")
    assert main(["info", "other.safetensors"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_leaks_names_pairs_of_images(cli: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, pairs, error = cli("leaks", "digits/train", "digits/train", "--threshold", "0.999", "--per-row", "1")
    assert code == 0, error
    assert len(pairs) == 1000  # every image is its own near-duplicate
    assert cli("leaks", "digits/train", "digits/test", "--threshold", "1.0")[1] == []
    assert main(["leaks", "digits/train", "digits/train", "--threshold", "0.999", "--per-row", "1"]) == 0
    title = capsys.readouterr().out.splitlines()[1]
    assert title.split("  ") == ["", "cosine", "test image", "training image", "class"]


@pytest.mark.parametrize("verb", ["fit", "finetune", "encode"])
def test_a_wrong_command_line_is_one_line(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert f"see `featcache {verb} --help`" in captured.err


def test_help_of_export_names_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "NAME/SPLIT" in shown
    assert "texts/NAME" in shown

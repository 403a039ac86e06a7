"""Results rows as CSV and LaTeX, and rows read back from results files."""

import csv
import json

import pytest

from featcache.errors import FeatcacheWarning, HeadError
from heads.report.formats import Shown, as_csv, as_latex, as_markdown, as_text, latex_text
from heads.report.read import by_split, is_epoch, latest, read_rows
from heads.report.rows import mean_of

ROWS = [
    {"head": "zero_shot", "encoder": "tiny", "a:top1": 0.8, "b:top1": 0.7, "a:nll": 0.5, "a:ece": 0.1},
    {"head": "a,b_&\n\\x", "encoder": "tiny", "alpha": 0.25, "a:top1": 0.9, "b:top1": 0.5, "a:nll": 0.4, "a:ece": 0.2},
]


def test_csv_holds_every_metric_and_reads_back():
    header, first, second = csv.reader(as_csv(ROWS, Shown()).splitlines(keepends=True))
    assert header == ["head", "alpha", "model", "a:top1", "a:nll", "a:ece", "b:top1"]
    assert first == ["zero_shot", "", "tiny", "0.8", "0.5", "0.1", "0.7"]
    assert second == ["a,b_&\n\\x", "0.25", "tiny", "0.9", "0.4", "0.2", "0.5"]


def test_latex_has_one_tabular_per_metric_and_no_command_of_a_name():
    text = as_latex(ROWS, Shown())
    assert text.count(r"\begin{tabular}{lrrr}") == 1  # a, b, drop
    assert text.count(r"\begin{tabular}{lr}") == 1  # NLL on a alone
    assert r"a,b\_\& \textbackslash{}x $\alpha$=0.25 & \textbf{90.0} & 50.0 & 40.0 \\" in text
    assert latex_text("$#%{}~^<") == r"\$\#\%\{\}\textasciitilde{}\textasciicircum{}\textless{}"


def test_a_metric_that_a_data_set_lacks_does_not_stop_the_tables():
    assert "NLL" in as_markdown(ROWS, Shown())
    assert "nll" not in as_text(ROWS, Shown())
    with pytest.raises(HeadError, match="no top1 on 'c'"):
        as_text(ROWS, Shown(["c"]))


def write(path, rows, tail=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return path


def test_files_are_read_in_order_and_an_unfinished_last_line_is_skipped(tmp_path):
    one = write(tmp_path / "1.jsonl", ROWS[:1])
    two = write(tmp_path / "2.jsonl", ROWS[1:], '{"head": "rid')
    with pytest.warns(FeatcacheWarning, match=r"2.jsonl:2: the last line is incomplete and is skipped"):
        assert read_rows([two, one]) == [ROWS[1], ROWS[0]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a:top1": 1}\nno\n{"a:top1": 1}\n', "2: not JSON"),
        ("[1]\n", "1: '\\[1\\]' is not a JSON object"),
        ('{"head": "ridge"}\n', "no row with a key"),
        ("", "no row with a key"),
    ],
)
def test_files_that_are_not_results_are_refused(tmp_path, content, message):
    path = tmp_path / "results.jsonl"
    path.write_text(content)
    with pytest.raises(HeadError, match=message):
        read_rows([path])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(HeadError, match=r"none\.jsonl: cannot be read"):
        read_rows([tmp_path / "none.jsonl"])


def test_the_latest_row_of_a_head_counts_and_data_sets_are_joined():
    ridge = {"head": "ridge", "params": {"alpha": 1.0}, "encoder": "tiny"}
    rows = [{**ridge, "a:top1": 0.1}, {**ridge, "b:top1": 0.2}, {**ridge, "a:top1": 0.3}]
    assert latest(rows) == [{**ridge, "a:top1": 0.3, "b:top1": 0.2}]


def test_data_sets_that_a_head_was_fitted_on_are_left_out_when_rows_are_joined():
    first = {"head": "ridge", "a:top1": 0.9, "b:top1": 0.99, "c:top1": 0.5, "shifted_left_out": ["b"]}
    later = {"head": "ridge", "a:top1": 0.9, "d:top1": 0.99, "c:top1": 0.5, "shifted_left_out": ["d"]}
    (row,) = latest([first, later])
    assert row["shifted_left_out"] == ["b", "d"]
    assert mean_of(row, ["b", "c", "d"], "top1") == 0.5


@pytest.mark.parametrize(("form", "best"), [(as_text, "{}*"), (as_markdown, "**{}**")])
def test_a_head_is_not_the_best_by_a_data_set_that_it_was_fitted_on(form, best):
    zero_shot = {"head": "zs", "a:top1": 0.8, "b:top1": 0.5, "c:top1": 0.7}
    fitted = {"head": "on b", "a:top1": 0.8, "b:top1": 0.99, "c:top1": 0.65, "shifted_left_out": ["b"]}
    text = form([zero_shot, fitted], Shown())
    assert best.format("99.0") not in text
    assert best.format("65.0") not in text  # a mean over other data sets than the other's, 60.0
    assert best.format("70.0") in text
    assert best.format("50.0") in text


def test_splits_of_one_data_set_stay_separate_when_rows_are_joined():
    ridge = {"head": "ridge", "encoder": "tiny"}
    test = {**ridge, "a:nll": 0.5, "splits": {"a": "a/test"}}
    train = {**ridge, "a:nll": 0.1, "splits": {"a": "a/train"}, "training_rows": ["a"]}
    both = {**ridge, "a/test:nll": 0.5, "b:nll": 0.7, "splits": {"a/test": "a/test", "b": "b/test"}}
    for rows in ([test, train], [both, test, train]):
        (row,) = latest(by_split(rows))
        assert (row["a/test:nll"], row["a/train:nll"], row["training_rows"]) == (0.5, 0.1, ["a/train"])
        assert "a:nll" not in row
    assert by_split([test, {**ridge, "a:nll": 0.4}]) == [test, {**ridge, "a:nll": 0.4}]  # one split: names stay


@pytest.mark.parametrize(("form", "best"), [(as_text, "{}*"), (as_markdown, "**{}**")])
def test_figures_of_training_rows_are_never_the_best(form, best):
    fitted = {"head": "on a", "a:top1": 0.99, "training_rows": ["a"]}
    text = form([{"head": "zs", "a:top1": 0.8}, fitted], Shown(metrics=("top1",)))
    assert best.format("80.0") in text
    assert best.format("99.0") not in text


def test_heads_of_one_name_are_told_apart_by_what_differs():
    rows = [{"head": "ridge", "params": {"alpha": a}, "fitted_on": [{"name": "d"}], "a:top1": 0.1} for a in (1, 2)]
    assert [row["head"] for row in latest(rows)] == ["ridge (alpha 1)", "ridge (alpha 2)"]


def test_rows_of_wise_ft_are_named_by_their_model():
    base = {"model": "ViT-B/32", "eval_datasets": ["ImageNet"], "freeze_encoder": False, "exp_name": None}
    epoch = {**base, "alpha": [0, 0.5], "current_epoch": 1, "ImageNet:top1": 0.5}
    assert is_epoch(epoch)
    assert not is_epoch({**base, "alpha": 0.5, "ImageNet:top1": 0.5})
    named = latest([{**base, "alpha": 0.5, "ImageNet:top1": 0.5}, {**base, "exp_name": "mine", "ImageNet:top1": 0.1}])
    assert [row["head"] for row in named] == ["WiSE-FT ViT-B/32, end to end", "mine"]


TRANSDUCTIVE = {"head": "transclip", "protocol": "transductive", "a:top1": 0.95, "b:top1": 0.9, "a:nll": 0.3}


@pytest.mark.parametrize(("form", "best"), [(as_text, "{}*"), (as_markdown, "**{}**"), (as_latex, r"\textbf{{{}}}")])
def test_transductive_heads_are_named_so_and_are_never_the_best_of_inductive_ones(form, best):
    text = form([*ROWS, TRANSDUCTIVE], Shown())
    assert "transclip (transductive)" in text
    assert best.format("90.0") in text  # of the inductive heads
    assert "95.0" in text
    assert best.format("95.0") not in text
    assert best.format("95.0") in form([TRANSDUCTIVE, TRANSDUCTIVE | {"a:top1": 0.5}], Shown())
    assert "transclip (transductive)" in as_csv([TRANSDUCTIVE], Shown())

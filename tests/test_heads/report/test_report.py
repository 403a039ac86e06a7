"""Tables, plots and the page of an evaluation."""

import re

import numpy as np
import pytest
from PIL import Image

from featcache.errors import HeadError
from heads.report import markdown_table, plot_nll_against_alpha, plot_robustness, table_text, write_report
from heads.report.plots import percent_ticks
from heads.report.rows import choose_datasets, datasets_of, mean_of, paths_of

DATASETS = ("digits", "digits-noisy", "digits-rotated")


def row(head, top1, nll, alpha=None):
    values = {f"{d}:top1": v for d, v in zip(DATASETS, top1, strict=True)}
    values |= {f"{d}:nll": v for d, v in zip(DATASETS, nll, strict=True)}
    return {"head": head, "params": {"alpha": 3.0}, **values, **({} if alpha is None else {"alpha": alpha})}


@pytest.fixture
def rows():
    zero, one = np.array([[0.8, 0.6, 0.5], [0.6, 1.0, 1.2]]), np.array([[0.95, 0.7, 0.55], [0.2, 0.9, 2.5]])
    heads = [row("zero_shot", *zero), row("ridge", *one), row("knn", *(0.98 * one))]
    return heads + [row("zero_shot+ridge", *((1 - a) * zero + a * one), float(a)) for a in (1.0, 0.0, 0.5)]  # type: ignore[call-arg]


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_markdown_table(rows):
    header, _, *lines = markdown_table(rows[:3]).splitlines()
    assert cells(header) == ["Accuracy, %", *DATASETS, "shifted mean", "drop"]
    assert cells(lines[0]) == [r"zero\_shot", "80.0", "60.0", "50.0", "55.0", "25.0"]
    assert cells(lines[1]) == ["ridge", "**95.0**", "**70.0**", "**55.0**", "**62.5**", "32.5"]


def test_lower_nll_is_better_and_rises(rows):
    header, _, *lines = markdown_table(rows[:2], metric="nll").splitlines()
    assert cells(header)[0] == "NLL, nats"
    assert cells(header)[-1] == "rise"
    assert cells(lines[0])[1:] == ["0.600", "1.000", "**1.200**", "**1.100**", "0.500"]
    assert cells(lines[1])[1:] == ["**0.200**", "**0.900**", "2.500", "1.700", "1.500"]


def test_values_that_print_equal_are_ties():
    near = [{"head": "a", "x:top1": 0.90001}, {"head": "b", "x:top1": 0.9}, {"head": "c", "x:top1": 0.89}]
    assert [cells(line)[1] for line in markdown_table(near).splitlines()[2:]] == ["**90.0**", "**90.0**", "89.0"]
    assert "**" not in markdown_table(near[:1])


def test_missing_values_are_dashes_and_have_no_mean(rows):
    partial = {key: value for key, value in rows[1].items() if key != "digits-rotated:top1"}
    broken = {**rows[2], "digits:top1": float("nan")}
    lines = markdown_table([rows[0], partial, broken]).splitlines()[2:]
    assert cells(lines[1])[1:] == ["**95.0**", "**70.0**", "–", "–", "–"]
    assert cells(lines[2])[1] == "–"
    assert cells(lines[2])[-1] == "–"


def test_reference_and_choice_of_datasets(rows):
    table = markdown_table(rows[:2], ["digits-noisy", "digits"], reference="digits-noisy")
    assert cells(table.splitlines()[0]) == ["Accuracy, %", "digits-noisy", "digits", "drop"]  # no mean of one
    assert cells(markdown_table(rows[:2], ["digits"]).splitlines()[0]) == ["Accuracy, %", "digits"]
    assert choose_datasets(rows, None, "digits-noisy") == ("digits-noisy", ["digits", "digits-rotated"])


def test_names_cannot_break_the_table():
    table = markdown_table([{"head": "a|b*c_d", "x:top1": 0.5}])
    assert r"| a\|b\*c\_d | 50.0 |" in table


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda rows: markdown_table(rows, metric="top2"), "expected one of top1"),
        (lambda rows: markdown_table(rows, ["mnist"]), "no top1 on 'mnist'; the rows hold digits, "),
        (lambda rows: markdown_table(rows, reference="mnist"), "no top1 on 'mnist'"),
        (lambda rows: markdown_table([]), "0 rows without a key"),
        (lambda rows: table_text(rows, metrics=("top1", "ece")), "ece"),
        (lambda rows: plot_robustness(rows, "x.png", datasets=["digits"]), "two data sets or more"),
        (lambda rows: plot_nll_against_alpha(rows[:3], "x.png"), "the rows hold none"),
        (lambda rows: plot_nll_against_alpha(rows, "x.png", name="a+b"), r"'a\+b': the rows hold zero_shot\+ridge"),
        (lambda rows: plot_nll_against_alpha(rows, "x.png", metric="ece"), "no 'ece' along"),
    ],
)
def test_rows_that_cannot_be_reported_are_refused(rows, call, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HeadError, match=message):
        call(rows)
    assert not list(tmp_path.iterdir())


def test_text_table(rows):
    lines = table_text(rows[:2], width=140).splitlines()
    assert re.split(r"\s{2,}", lines[0].strip()) == [*DATASETS, "shifted mean", "drop / rise"]
    assert lines[1].split() == ["top1", "%", "nll"] * 5
    for line, wanted in zip(
        lines[2:],
        (
            "zero_shot 80.0 0.600 60.0 1.000 50.0 1.200* 55.0 1.100* 25.0 0.500",
            "ridge 95.0* 0.200* 70.0* 0.900* 55.0* 2.500 62.5* 1.700 32.5 1.500",
        ),
        strict=True,
    ):
        assert " ".join(line.split()) == wanted
    points = {tuple(match.start() for match in re.finditer(r"\.", line)) for line in lines[2:]}
    assert len(points) == 1, "decimal points stand below each other"


def test_data_sets_of_other_heads_are_not_shifts(rows, tmp_path):
    """Two label styles, or two projects, in one file: no mean over what no head of the first data set was judged on."""
    apart = [{"head": "a", "x:top1": 0.9, "x:nll": 0.3}, {"head": "b", "y:top1": 0.8, "y:nll": 0.5}]
    assert re.split(r"\s{2,}", table_text(apart).splitlines()[0].strip()) == ["x", "y"]
    assert cells(markdown_table(apart).splitlines()[0]) == ["Accuracy, %", "x", "y"]
    table = markdown_table([*rows[:2], *apart]).splitlines()
    assert cells(table[0])[1:] == [*DATASETS, "x", "y", "shifted mean", "drop"]
    assert cells(table[2])[6:] == ["55.0", "25.0"]  # over noisy and rotated alone
    assert cells(table[4])[6:] == cells(table[5])[6:] == ["–", "–"]
    page, markdown, *_ = write_report(apart, tmp_path / "apart", title="Two")
    for text in (page.read_text(), markdown.read_text()):
        assert "Evaluated on x, y." in text
        assert "shifted" not in text.replace("--shifted", "").partition("<script")[0].lower()


def test_names_cannot_break_the_text_table():
    head, _, values = table_text([{"head": "a\n# b\x1b[31m", "x\ny:top1": 0.5, "x\ny:nll": 0.25}]).split("\n")
    assert head.strip() == "x y"
    assert values.split() == ["a", "#", r"b\x1b[31m", "50.0", "0.250"]


def test_text_table_is_broken_into_blocks(rows):
    """Every block begins with the heads; as many data sets stand side by side as there is room for."""
    wide = table_text(rows, width=1000).splitlines()
    assert len(wide) == 2 + len(rows)
    for width, count in ((max(map(len, wide)) + 1, 1), (110, 2), (80, 2), (60, 3), (1, 5)):
        blocks = [block.splitlines() for block in table_text(rows, width=width).split("\n\n")]
        assert len(blocks) == count
        assert width == 1 or max(len(line) for block in blocks for line in block) <= width
        margin = wide[1].index("top1")
        assert all(block[line][:margin] == wide[line][:margin] for block in blocks for line in range(2, len(wide)))
        joined = ["".join(block[line][margin:] for block in blocks) for line in range(2, len(wide))]
        assert [re.findall(r"\d+\.\d+", line) for line in joined] == [
            re.findall(r"\d+\.\d+", line[margin:]) for line in wide[2:]
        ]


def test_a_hyper_parameter_alpha_is_not_an_interpolation(rows):
    """Only a float `alpha` at the top level is an interpolation; WiSE-FT's rows also carry lists."""
    listed = {**rows[1], "alpha": [0.0, 0.5]}
    assert paths_of([listed, *rows[:3]]) == {}
    assert [r["alpha"] for r in paths_of(rows)["zero_shot+ridge"]] == [0.0, 0.5, 1.0]


def test_data_sets_keep_their_order_and_means_are_over_those_named(rows):
    assert datasets_of(rows) == list(DATASETS)
    assert mean_of(rows[0], DATASETS[1:], "top1") == pytest.approx(0.55)
    assert mean_of(rows[0], [], "top1") is None


def size_of(path):
    with Image.open(path) as picture:
        return picture.size


def test_plots_are_written_and_reproducible(rows, tmp_path):
    first = plot_robustness(rows, tmp_path / "new" / "a.png")
    assert first == tmp_path / "new" / "a.png"
    assert min(size_of(first)) > 600
    assert first.read_bytes() == plot_robustness(rows, tmp_path / "b.png").read_bytes()
    changed = [{**r, "digits:top1": r["digits:top1"] - 0.1} for r in rows]
    assert first.read_bytes() != plot_robustness(changed, tmp_path / "c.png").read_bytes()
    assert min(size_of(plot_nll_against_alpha(rows, tmp_path / "d.png"))) > 600
    assert plot_robustness(rows, tmp_path / "e.svg").read_text().lstrip().startswith("<?xml")


def test_plots_of_awkward_rows(tmp_path):
    """Accuracies 0 and 1, a single point, equal points, a single alpha, NLL 0 and NLL over decades."""
    odd = [row("a", (0.0, 1.0, 1.0), (0.0, 0.0, 0.0), 0.0), row("b", (1.0, 0.0, 0.0), (0.0, 50.0, 0.001), 1.0)]
    same = [row(name, (0.5, 0.5, 0.5), (1.0, 1.0, 1.0)) for name in ("p", "q", "r")]
    for number, chosen in enumerate((odd, same, same[:1], [*odd, *same])):
        assert plot_robustness(chosen, tmp_path / f"{number}.png").stat().st_size > 5000
    assert plot_nll_against_alpha(odd[:1], tmp_path / "one.png").exists()
    wide = [row("h", (0.5, 0.5, 0.5), (0.01 * 9**a, 20.0, 1e-4), a) for a in (0.0, 0.5, 1.0)]
    assert plot_nll_against_alpha(wide, tmp_path / "wide.png").exists()


def test_a_report_has_a_page_tables_and_plots(rows, tmp_path):
    html, page, *plots = write_report(rows, tmp_path / "out", title="Digits", notes="On two cores.")
    text = page.read_text(encoding="utf-8")
    assert (html.name, page.name) == ("report.html", "report.md")
    assert text.startswith("# Digits\n\nOn two cores.\n")
    shifts = ["accuracy-digits-noisy.png", "accuracy-digits-rotated.png"]
    assert [p.name for p in plots] == ["accuracy.png", *shifts, "nll-1.png"]
    for plot in plots:
        assert f"]({plot.name})" in text
        assert plot.exists()
    assert text.count("| Accuracy, % |") == 2  # heads, and the interpolation
    assert "α=0.5" in text


def test_report_without_shift_or_interpolation(rows, tmp_path):
    written = write_report(rows[:2], tmp_path, datasets=["digits"])
    assert written == [tmp_path / "report.html", tmp_path / "report.md"]
    assert "shifted mean" not in (tmp_path / "report.md").read_text()


def test_report_keeps_its_reference_in_every_table(rows, tmp_path):
    _, page, *_ = write_report(rows, tmp_path, reference="digits-rotated")
    headers = [line for line in page.read_text().splitlines() if line.startswith(("| Acc", "| NLL"))]
    assert {cells(header)[1] for header in headers} == {"digits-rotated"}
    assert len(headers) == 4


def test_percent_ticks_are_round_numbers_within_the_range():
    assert percent_ticks(0.66, 0.87) == [0.7, 0.75, 0.8, 0.85]
    assert percent_ticks(0.76, 0.78) == [0.76, 0.77, 0.78]
    assert percent_ticks(0.501, 0.502) == []
    assert len(percent_ticks(0.05, 0.95, most=7)) <= 7


def test_every_head_and_data_set_is_in_a_legend(rows, tmp_path):
    robustness = plot_robustness(rows, tmp_path / "a.svg").read_text()
    for text in ("zero_shot", "ridge", "knn", "zero_shot+ridge, by α"):
        assert f"<!-- {text} -->" in robustness
    along = plot_nll_against_alpha(rows, tmp_path / "b.svg").read_text()
    assert all(f"<!-- {name} -->" in along for name in DATASETS)


def test_names_cannot_add_html_markup_or_lines_to_the_page(tmp_path):
    name = "a<script>alert(1)</script>\n## b | [c](d) `e` \x1b[31m $\\frac$ 漢"
    row = {"head": name, f"{name}:top1": 0.5, f"{name}:nll": 1.0, "other:top1": 0.25, "other:nll": 2.0}
    path = [{**row, "alpha": alpha} for alpha in (0.0, 0.5)]
    written = write_report([row, *path], tmp_path)
    assert len(written) == 4  # the plots took the names, too
    page = written[1].read_text()
    assert "<script" not in page
    assert "\x1b" not in page
    assert [line for line in page.splitlines() if line.startswith("## b")] == []
    escaped = r"a&lt;script&gt;alert(1)&lt;/script&gt; ## b \| \[c\](d) \`e\`  \[31m $\\frac$ 漢"
    header = next(line for line in page.splitlines() if line.startswith("| Accuracy"))
    assert header == f"| Accuracy, % | {escaped} | other | drop |"

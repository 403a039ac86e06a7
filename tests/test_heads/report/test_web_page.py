"""The page of a run: what it shows, how it escapes, and how large it is. How it looks is tested in a browser."""

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from featcache.datasets import open_dataset
from featcache.encoders import load_encoder
from featcache.encoding.images import encode_dataset
from heads import LinearHead
from heads.report.against import compare_published
from heads.report.charts import Axis, Curve, curve_chart, robustness_chart
from heads.report.details import head_details
from heads.report.formats import Shown
from heads.report.web import MOST_BYTES, Background, class_tables, headline, write_page

DATASETS = ("clean", "fog", "snow")
EVIL = "<script>alert(1)</script>](x \x1b[31m\u202eabc\x00 \"'&"


def row(head, values, alpha=None):
    found = {f"{d}:top1": v for d, v in zip(DATASETS, values, strict=True)}
    found |= {f"{d}:nll": 2 - v for d, v in zip(DATASETS, values, strict=True)}
    return {"head": head, **found, **({} if alpha is None else {"alpha": alpha})}


class Reader(HTMLParser):
    """Elements, attributes and texts of a page."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def read(path):
    return Reader(path.read_text(encoding="utf-8"))


def test_external_names_are_escaped(tmp_path):
    rows = [row(EVIL, (0.5, 0.4, 0.3)) | {"params": {EVIL: EVIL}, "fitted_on": [{"name": EVIL}]}]
    rows[0] = {key.replace("fog", EVIL): value for key, value in rows[0].items()}
    rows[0][f"{EVIL}:group_top1"] = {EVIL: 0.5}
    background = Background(notes=[EVIL], facts={EVIL: {EVIL: EVIL}})
    text = write_page(rows, tmp_path / "a.html", title=EVIL, background=background).read_text(encoding="utf-8")
    page = Reader(text)
    assert len(page.all("script")) == 1
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", text)
    shown = "<script>alert(1)</script>](x �[31m�abc� \"'&"
    assert page.texts.count(shown) > 5
    assert all(not name.startswith("on") for _, attributes in page.elements for name in attributes)


def test_the_page_needs_no_network_and_runs_its_own_script_alone(tmp_path):
    text = write_page([row("a", (0.5, 0.4, 0.3))], tmp_path / "a.html").read_text(encoding="utf-8")
    found = re.search(r"<script>(.*?)</script>", text, re.DOTALL)
    assert found is not None
    script = found[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [meta["content"] for meta in Reader(text).all("meta") if "http-equiv" in meta]
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    assert not re.search(r"https?://|@import|src=\"(?!data:)|href=\"(?!#|data:)", text)


def test_the_table_marks_the_best_and_sorts_by_exact_values(tmp_path):
    rows = [row("a", (0.901, 0.5, 0.3)), row("b", (0.9014, 0.4, 0.5))]
    rows[0]["clean:top1_interval"] = [0.88, 0.92]
    table = headline(rows, "clean", ["fog", "snow"], "top1")
    assert table.columns == ["clean", "fog", "snow", "shifted mean", "drop"]
    (first, second) = (cells for _, cells in table.lines)
    assert [cell.best for cell in first] == [True, True, False, False, False]  # 90.1 and 90.1 read the same
    assert [cell.best for cell in second] == [True, False, True, True, False]
    assert (first[0].interval, second[0].interval) == ("88.0 to 92.0", "")
    assert [cell.shade for cell in first[:3]] == [0, 1, 0]
    page = read(write_page(rows, tmp_path / "a.html", Shown(metrics=["top1"])))
    assert [float(td["data-v"]) for td in page.all("td")][:4] == [0.901, 0.5, 0.3, 0.4]


def test_points_are_placed_on_the_logit_scale():
    rows = [row("z", (0.6, 0.5, 0.3), 0.0), row("z", (0.7, 0.6, 0.5), 0.5), row("z", (0.8, 0.4, 0.2), 1.0)]
    chart = robustness_chart(rows, "clean", ["fog", "snow"])
    assert chart is not None
    marks = next(series.marks for series in chart.series if series.marks)
    assert [mark.shape for mark in marks] == ["star", "thin", "diamond"]
    z = np.log(np.array([0.6, 0.7, 0.8]) / np.array([0.4, 0.3, 0.2]))
    pixels = np.array([mark.x for mark in marks])
    np.testing.assert_allclose(np.diff(pixels) / np.diff(z), np.ptp(pixels) / np.ptp(z), rtol=5e-3)
    heights = np.array([mark.y for mark in marks])
    assert heights.argsort().tolist() == [1, 0, 2]  # means 0.55, 0.4, 0.3, pixels count from the top
    assert "fog" not in marks[0].tip
    assert "mean of 2 shifted data sets 40.00 %" in marks[0].tip


def test_heads_that_lack_a_shift_are_left_out_of_its_chart():
    partial = {key: value for key, value in row("b", (0.5, 0.5, 0.5)).items() if not key.startswith("snow")}
    assert robustness_chart([partial], "clean", ["snow"]) is None
    chart = robustness_chart([partial], "clean", ["fog"])
    assert chart is not None
    assert len([s for s in chart.series if s.marks]) == 1


def test_heads_that_differ_in_shots_alone_are_one_line_from_few_to_many():
    rows = [
        {"head": f"ridge, {k} shot{'s' * (k > 1)}", "shots": k, "clean:top1": 0.5 + k / 100, "fog:top1": 0.4 + k / 90}
        for k in (4, 1, 2)
    ]
    chart = robustness_chart([*rows, {"head": "zero_shot", "clean:top1": 0.6, "fog:top1": 0.5}], "clean", ["fog"])
    assert chart is not None
    ridge, zero_shot = (series for series in chart.series if series.marks)
    assert (ridge.name, zero_shot.name) == ("ridge", "zero_shot")
    assert [mark.tip.partition("\n")[0] for mark in ridge.marks] == [
        "ridge, 1 shot",
        "ridge, 2 shots",
        "ridge, 4 shots",
    ]
    assert ridge.line == " ".join(f"{mark.x:g},{mark.y:g}" for mark in ridge.marks)
    assert not zero_shot.line


def test_axes_map_ends_to_ends_and_ticks_are_round():
    assert [Axis(1, 100, 0, 10, "log")(value) for value in (1, 10, 100)] == [0, 5, 10]
    assert [text for _, text in Axis(0.0, 1.0, 0, 100).ticks()] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert [text for _, text in Axis(0.66, 0.87, 0, 400, "logit").ticks()] == ["70", "75", "80", "85"]


def test_spread_becomes_a_band_and_the_best_point_a_larger_mark():
    lines = {"a": [(1, 2.0), (10, 4.0), (100, 3.0)], "b": [(1, 1.0)]}
    curve = Curve("t", "C", "y", lines, {"a": [0.5, 0.5, 1.0]}, log=True)
    first, second = curve_chart(curve, best=max).series
    assert len(first.band.split()) == 6
    assert second.band == ""
    assert [mark.size for mark in first.marks] == [0.6, 1.0, 0.6]
    xs = [mark.x for mark in first.marks]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)  # decades are equally wide


def test_the_band_of_percentages_ends_at_100():
    curve = Curve("t", "shots", "Accuracy (%)", {"a": [(1, 97.0), (2, 99.0)]}, {"a": [1.0, 2.0]})
    (series,) = curve_chart(curve).series
    heights = [float(point.partition(",")[2]) for point in series.band.split()]  # upper edge, then lower edge backwards
    assert heights[1] - series.marks[1].y == pytest.approx((heights[0] - series.marks[0].y), rel=0.02)  # one point both
    assert heights[2] - series.marks[1].y == pytest.approx(2 * (heights[3] - series.marks[0].y), rel=0.02)


def test_two_hundred_heads_on_twelve_data_sets_fit_and_more_are_cut_to_the_best(tmp_path):
    rng = np.random.default_rng(0)
    names = [f"data-{i}" for i in range(12)]

    keys = [f"{d}:{m}" for d in names for m in ("top1", "nll")]

    def many(n):
        return [{"head": f"h{i}", **dict(zip(keys, rng.uniform(0.1, 0.9, len(keys)), strict=True))} for i in range(n)]

    assert write_page(many(200), tmp_path / "a.html").stat().st_size < MOST_BYTES
    rows = many(700)
    path = write_page(rows, tmp_path / "b.html")
    assert path.stat().st_size <= MOST_BYTES
    text = path.read_text()
    assert "700 heads" in text
    best = max(rows, key=lambda row: row["data-0:top1"])["head"]
    assert f'<th scope="row">{best}</th>' in text


def test_published_figures_are_shown_and_differences_beyond_tolerance_marked(tmp_path):
    rows = [{"head": "zero_shot", "encoder": "ViT-B-16-quickgelu/openai", "imagenet:top1": 0.6, "imagenet:nll": 1.168}]
    published = compare_published(rows, "published:giung2-dev")
    page = read(write_page(rows, tmp_path / "a.html", background=Background(published=published)))
    assert "-8.34" in page.texts
    assert [tr.get("class") for tr in page.all("tr")].count("beyond") == 1


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("cache")
    return encode_dataset(open_dataset("digits", "test"), load_encoder("tiny"), root=root).store


@pytest.fixture
def head(digits):
    rng = np.random.default_rng(0)
    return LinearHead(rng.normal(size=(10, digits.dim)) * 5, np.zeros(10), digits.classnames, "random", {})


def test_details_agree_with_numpy(digits, head):
    (found,) = head_details(head, [digits], ["digits"], calibrated=head.with_temperature(4.0))
    X, y = digits.numpy(np.float64)
    logits = X @ head.weights.T
    guess = logits.argmax(1)
    np.testing.assert_array_equal(found.class_rows, np.bincount(y, minlength=10))
    np.testing.assert_array_equal(found.class_hits, np.bincount(y[guess == y], minlength=10))
    counts = np.zeros((10, 10), int)
    np.add.at(counts, (y, guess), 1)
    np.fill_diagonal(counts, 0)
    assert [c.rows for c in found.confusions] == sorted(counts.ravel().tolist(), reverse=True)[: len(found.confusions)]
    worst = found.confusions[0]
    assert counts[digits.classnames.index(worst.label), digits.classnames.index(worst.predicted)] == counts.max()
    for shown, temperature in ((found.reliability, 1.0), (found.calibrated, 4.0)):
        assert shown is not None
        p = np.exp(logits / temperature - (logits / temperature).max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        bins = np.clip(np.ceil(p.max(1) * 15).astype(int) - 1, 0, 14)
        sets = [(bins == b).nonzero()[0] for b in np.unique(bins)]
        expected = [(p.max(1)[rows].mean(), (guess == y)[rows].mean(), len(rows)) for rows in sets]
        np.testing.assert_allclose(shown.bins, expected, atol=1e-4)
        assert shown.nll == pytest.approx(-np.log(p[np.arange(len(y)), y]).mean(), abs=1e-3)


def test_a_calibration_chart_says_before_only_beside_after(digits, head, tmp_path):
    rows = [{"head": "random", "digits:top1": 0.1, "digits:nll": 2.5}]
    for calibrated, legend in ((None, "random, NLL"), (head.with_temperature(4.0), "before, NLL")):
        details = head_details(head, [digits], ["digits"], calibrated=calibrated)
        page = read(write_page(rows, tmp_path / "a.html", background=Background(details=details)))
        assert any(text.strip().startswith(legend) for text in page.texts), legend


def test_confusions_have_pictures_if_the_images_exist(digits, head, monkeypatch):
    (found,) = head_details(head, [digits], ["digits"])
    assert found.no_pictures == ""
    assert found.confusions[0].pictures[0].startswith("data:image/png;base64,")
    from heads.report import details

    monkeypatch.setattr(details, "open_datasets", lambda *args, **kwargs: [open_dataset("digits", "val")])
    (changed,) = head_details(head, [digits], ["digits"])
    assert changed.no_pictures == "the images have changed since they were encoded"
    assert not changed.confusions[0].pictures


def test_with_many_classes_the_worst_are_shown(digits, head):
    (found,) = head_details(head, [digits], ["digits"])
    many = replace(
        found,
        classnames=tuple(f"c{i}" for i in range(60)),
        class_rows=np.full(60, 10),
        class_hits=np.arange(60) % 11,
    )
    (table,) = class_tables([many])
    assert len(table.lines) == 40
    assert max(cells[0].value or 0.0 for _, cells in table.lines) <= 0.7
    assert "40 of 60 classes" in table.note

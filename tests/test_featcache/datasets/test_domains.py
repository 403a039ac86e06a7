"""``collection:NAME:ROOT`` on folder trees in the published layouts."""

import re

import numpy as np
import pytest
from PIL import Image

from featcache.datasets import open_dataset, open_datasets
from featcache.datasets.sources.collection import COLLECTIONS, CollectionOptions, open_collection
from featcache.errors import DatasetError

PACS = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")


def picture(path, colour=(1, 2, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), colour).save(path)


def pacs(root, below="kfold"):
    for d, domain in enumerate(COLLECTIONS["pacs"].domains):
        for c, name in enumerate(PACS):
            picture(root / below / domain / name / "pic 1.png", (d, c, 0))
    return root


def test_every_domain_is_a_data_set_with_one_class_list(tmp_path):
    datasets = open_datasets(f"collection:pacs:{pacs(tmp_path)}", "all")
    assert [d.name for d in datasets] == ["pacs-art_painting", "pacs-cartoon", "pacs-photo", "pacs-sketch"]
    assert {d.index.classnames for d in datasets} == {PACS}
    for number, data in enumerate(datasets):
        domain = data.name.removeprefix("pacs-")
        assert data.index.ids == [f"{domain}/{name}/pic 1.png" for name in PACS]
        assert data.index.labels.tolist() == list(range(7))
        assert np.asarray(data.decode(data.read(2), 2))[0, 0].tolist() == [number, 2, 0]


def test_published_lists_are_splits(tmp_path):
    root = pacs(tmp_path)
    for domain in COLLECTIONS["pacs"].domains:
        (root / "kfold" / f"{domain}_test_kfold.txt").write_text(
            f"{domain}/house/pic 1.png 6\n{domain}/dog/pic 1.png 1\n"
        )
    with pytest.warns(UserWarning, match="5 of 7 classes"):
        datasets = open_datasets(f"collection:pacs:{root}", "test_kfold", name="mine")
    assert [d.name for d in datasets][3] == "mine-sketch"
    assert datasets[3].index.labels.tolist() == [PACS.index("house"), 0]  # the folder counts, the numbers start at 1
    assert np.asarray(datasets[3].decode(datasets[3].read(0), 0))[0, 0].tolist() == [3, PACS.index("house"), 0]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("sketch/house/pic 1.png 1\nsketch/dog/pic 1.png 1\n", "number 1 means 'house' above and 'dog' here"),
        ("sketch/house/pic 1.png 1\nsketch/house/../house/pic 1.png 1\n", r"'\.\.' is refused"),
        ("sketch/cow/pic 1.png 1\n", "class 'cow' has no folder"),
        ("pic 1.png 1\n", "expected <domain>/<class>/<image>"),
        ("sketch/dog/a.png 1\n", "none of its 1 images exist"),
    ],
)
def test_damaged_lists_are_refused(tmp_path, lines, message):
    (pacs(tmp_path) / "kfold" / "sketch_test.txt").write_text(lines)
    with pytest.raises(DatasetError, match=message):
        open_dataset(f"collection:pacs:{tmp_path},domain=sketch", "test")


def test_one_class_with_two_numbers_is_refused(tmp_path):
    picture(pacs(tmp_path) / "kfold/sketch/dog/pic 2.png")
    (tmp_path / "kfold/sketch_test.txt").write_text("sketch/dog/pic 1.png 1\nsketch/dog/pic 2.png 2\n")
    with pytest.raises(DatasetError, match="more than one number"):
        open_dataset(f"collection:pacs:{tmp_path},domain=sketch", "test")


def test_spelling_of_domains_is_ignored_and_images_folders_are_entered(tmp_path):
    for c in range(65):
        for domain in ("art", "Clipart", "Product", "RealWorld"):
            picture(tmp_path / "home" / domain / f"c{c:02}" / "1.png")
    names = [d.name for d in open_datasets(f"collection:officehome:{tmp_path / 'home'}", "all")]
    assert names == ["officehome-Art", "officehome-Clipart", "officehome-Product", "officehome-Real-World"]
    for c in range(31):
        for domain in ("amazon", "dslr", "webcam"):
            picture(tmp_path / "31" / domain / "images" / f"c{c:02}" / "1.png")
    data = open_dataset(f"collection:office31:{tmp_path / '31'},domain=dslr", "all")
    assert (data.name, data.index.ids[0], len(data.index)) == ("office31-dslr", "dslr/images/c00/1.png", 31)


def test_domainnet_is_ordered_as_its_published_lists(tmp_path):
    """Folders sorted by code point would put every capital first (``The_Eiffel_Tower`` before ``aircraft_carrier``)."""
    names = ["The_Eiffel_Tower", "aircraft_carrier", "t-shirt", "The_Mona_Lisa", "table", "toe", "square", "animal_x"]
    names += [f"zz{n:03}" for n in range(345 - len(names))]
    for name in names:
        picture(tmp_path / "real" / name / "real_1.png")
    data = open_dataset(f"collection:domainnet:{tmp_path},domain=real", "all")
    reference = sorted(names, key=lambda name: re.sub("[^a-z0-9]", "", name.lower()))
    assert list(data.index.classnames) == reference != sorted(names)
    assert data.index.classnames[:2] == ("aircraft_carrier", "animal_x")
    assert [data.index.classnames[c] for c in data.index.labels] == [path.split("/")[1] for path in data.index.ids]


def test_any_folder_of_domains(tmp_path):
    for place in ("a/cat/1.png", "a/dog/1.png", "b/dog/2.png", "b/val/dog/3.png"):
        picture(tmp_path / "farm" / place)
    (tmp_path / "farm/classes.txt").write_text("dog\tgood dog\ncat\nval\n")
    with pytest.warns(UserWarning, match="have no image"):
        a, b = open_datasets(f"collection:domains:{tmp_path / 'farm'}", "all")
    assert (a.name, b.name, a.index.classnames) == ("farm-a", "farm-b", ("good dog", "cat", "val"))
    assert a.index.labels.tolist() == [1, 0]
    with pytest.warns(UserWarning, match="2 of 3 classes"):
        data = open_dataset(f"collection:domains:{tmp_path / 'farm'},domain=b", "val")
    assert (data.index.ids, data.index.labels.tolist()) == (["b/val/dog/3.png"], [0])


def test_errors_list_what_exists(tmp_path):
    root = pacs(tmp_path, below=".")
    with pytest.raises(DatasetError, match=r"holds 4 domains .* add ,domain=NAME"):
        open_dataset(f"collection:pacs:{root}", "all")
    with pytest.raises(DatasetError, match="no domain drawing; there are art_painting, cartoon"):
        open_datasets(f"collection:pacs:{root},domain=sketch+drawing", "all")
    with pytest.raises(DatasetError, match=r"no split 'test': looked for .*art_painting_test\.txt"):
        open_datasets(f"collection:pacs:{root}", "test")
    with pytest.raises(DatasetError, match="expected collection:NAME:ROOT with one of the names pacs"):
        open_datasets(f"collection:{root}", "all")
    with pytest.raises(DatasetError, match="no domain of vlcs in it"):
        open_datasets(f"collection:vlcs:{root}", "all")
    with pytest.raises(DatasetError, match="unknown option 'domains', did you mean 'domain'"):
        open_datasets(f"collection:pacs:{root},domains=a", "all")
    picture(root / "sketch" / "cow" / "1.png")
    with pytest.raises(DatasetError, match=r"have 8 class folders .* pacs has 7"):
        open_datasets(f"collection:pacs:{root}", "all")
    with pytest.raises(DatasetError, match="no such folder"):
        open_collection(f"pacs:{root}/nowhere", "all", CollectionOptions())
    (root / "classes.txt").write_text("\n".join(PACS))
    with pytest.raises(DatasetError, match="folders cow are not classes"):
        open_dataset(f"collection:pacs:{root},domain=sketch", "all")

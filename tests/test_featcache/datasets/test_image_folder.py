"""``imagefolder:DIR`` on trees of real files."""

import os

import numpy as np
import pytest
from PIL import Image

from featcache.cli.main import main
from featcache.datasets import open_dataset
from featcache.datasets.sources.image_folder import EXTENSIONS
from featcache.errors import DatasetError, ImageReadError


def picture(path, colour=(10, 20, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (5, 4), colour).save(path)
    return path


@pytest.fixture
def tree(tmp_path):
    for split, names in (("train", ("cat/1.png", "Dog/b.jpg", "Dog/a.jpeg")), ("val", ("cat/2.png", "Dog/c.bmp"))):
        for name in names:
            picture(tmp_path / "Real World" / split / name)
    return tmp_path / "Real World"


def test_the_index_lists_files_and_classes_in_order(tree):
    data = open_dataset(f"imagefolder:{tree}", "train")
    assert (data.name, data.split) == ("Real-World", "train")
    assert list(data.index.ids) == ["Dog/a.jpeg", "Dog/b.jpg", "cat/1.png"]
    assert data.index.classnames == ("Dog", "cat")  # by code point: capitals first, as torchvision's ImageFolder
    assert data.index.labels.tolist() == [0, 0, 1]
    file = tree / "train" / "cat" / "1.png"
    assert data.index.sizes[2] == file.stat().st_size
    assert data.index.stamps[2] == file.stat().st_mtime_ns
    assert data.read(2) == file.read_bytes()
    assert np.asarray(data.decode(data.read(2), 2))[0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize(("inside", "split"), [("train", "train"), ("val", "train"), ("train", "val")])
def test_a_split_folder_suggests_its_parent(tree, inside, split):
    with pytest.raises(DatasetError, match=f"like a split itself: name its parent, {tree}, with --split {split}"):
        open_dataset(f"imagefolder:{tree}/{inside}", split)


def test_same_order_as_torchvision(tree):
    datasets = pytest.importorskip("torchvision.datasets")
    for name in ("b cat/x.png", "b/z.png", "b/sub/deep.png", "b!/y.PNG", "é/ü.webp"):
        picture(tree / "train" / name)
    theirs = datasets.ImageFolder(tree / "train")
    ours = open_dataset(f"imagefolder:{tree}", "train").index
    assert list(ours.classnames) == theirs.classes
    known = {os.path.relpath(path, tree / "train"): label for path, label in theirs.samples}
    assert dict(zip(ours.ids, ours.labels.tolist(), strict=True)) == known
    assert list(ours.ids) == sorted(known)


def test_nested_spaces_non_ascii_and_capital_extensions(tmp_path):
    names = ["été/наш кот.JPG", "été/deep/er/x.Tiff", "zebra crossing/1 2.png"]
    for name in names:
        picture(tmp_path / "test" / name)
    data = open_dataset(f"imagefolder:{tmp_path}", "test")
    assert list(data.index.ids) == sorted(names)
    assert data.index.classnames == ("zebra crossing", "été")
    assert all(data.decode(data.read(row), row).size == (5, 4) for row in range(3))


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_every_extension_is_read(extension, tmp_path):
    path = tmp_path / "test" / "a" / f"x{extension}"
    path.parent.mkdir(parents=True)
    Image.new("L" if extension == ".pgm" else "RGB", (5, 4), 128).save(path)
    data = open_dataset(f"imagefolder:{tmp_path}", "test")
    assert data.decode(data.read(0), 0).size == (5, 4)


def test_other_and_hidden_files_are_skipped(tree):
    for name in ("cat/readme.txt", "cat/._1.png", "Dog/.thumbs/x.png", ".ipynb_checkpoints/x.png", "loose.png"):
        picture(tree / "train" / f"{name}.png").rename(tree / "train" / name)
    assert len(open_dataset(f"imagefolder:{tree}", "train").index) == 3


@pytest.mark.parametrize("alias", ["validation", "val_in_folder"])
def test_val_may_have_other_names(tree, alias):
    (tree / "val").rename(tree / alias)
    data = open_dataset(f"imagefolder:{tree}", "val")
    assert data.split == "val"
    assert list(data.index.ids) == ["Dog/c.bmp", "cat/2.png"]


def test_flat_val_beside_val_in_folder(tree):
    (tree / "val").rename(tree / "val_in_folder")
    picture(tree / "val" / "ILSVRC2012_val_00000001.png")
    assert len(open_dataset(f"imagefolder:{tree}", "val").index) == 2


def test_all_takes_the_folders_directly(tree):
    data = open_dataset(f"imagefolder:{tree / 'train'}", "all", name="mine")
    assert (data.name, data.split, data.index.classnames) == ("mine", "all", ("Dog", "cat"))


def test_all_does_not_take_splits_for_classes(tree):
    with pytest.raises(DatasetError, match="train, val look like splits"):
        open_dataset(f"imagefolder:{tree}", "all")


def test_class_file_gives_order_and_names(tree):
    (tree / "classes.txt").write_text("# ours\ncat\ta cat\n\nDog\n", encoding="utf-8")
    data = open_dataset(f"imagefolder:{tree}", "train")
    assert data.index.classnames == ("a cat", "Dog")
    assert list(data.index.ids) == ["Dog/a.jpeg", "Dog/b.jpg", "cat/1.png"]  # the rows stay where they are
    assert data.index.labels.tolist() == [1, 1, 0]


def test_display_names_may_repeat(tree):
    (tree / "classes.txt").write_text("cat\tmissile\nDog\tmissile\n")
    assert open_dataset(f"imagefolder:{tree}", "train").index.classnames == ("missile", "missile")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat\n", "Dog"),
        ("cat\nDog\ncat\n", r"classes.txt:3: 'cat' is already on line 1"),
        ("cat\tA\tB\nDog\n", r"classes.txt:1: .*one tab"),
        ("\n# nothing\n", "no class name"),
    ],
)
def test_class_files_that_do_not_match_the_folders_are_refused(tree, text, message):
    (tree / "classes.txt").write_text(text)
    with pytest.raises(DatasetError, match=message):
        open_dataset(f"imagefolder:{tree}", "train")


def test_a_class_file_that_is_not_text_is_refused(tree):
    (tree / "classes.txt").write_bytes(b"cat\n\xff\xfe\n")
    with pytest.raises(DatasetError, match="byte 4 is not UTF-8"):
        open_dataset(f"imagefolder:{tree}", "train")


def test_empty_class_stays_with_a_warning(tree):
    (tree / "train" / "emu").mkdir()
    with pytest.warns(UserWarning, match="1 of 3 classes have no image: emu"):
        data = open_dataset(f"imagefolder:{tree}", "train")
    assert data.index.classnames == ("Dog", "cat", "emu")


def test_links_are_followed_and_a_circle_is_refused(tree, tmp_path):
    os.symlink(picture(tmp_path / "elsewhere" / "owl" / "1.png"), tree / "train" / "cat" / "link.png")
    os.symlink(tmp_path / "elsewhere" / "owl", tree / "train" / "owl")
    data = open_dataset(f"imagefolder:{tree}", "train")
    assert list(data.index.ids)[-2:] == ["cat/link.png", "owl/1.png"]
    os.symlink(tree / "train", tree / "train" / "cat" / "circle")
    with pytest.raises(DatasetError, match="circle"):
        open_dataset(f"imagefolder:{tree}", "train")


def test_unreachable_file_keeps_its_row(tree):
    os.symlink(tree / "gone.png", tree / "train" / "cat" / "broken.png")
    data = open_dataset(f"imagefolder:{tree}", "train")
    row = list(data.index.ids).index("cat/broken.png")
    assert data.index.sizes[row] == 0
    with pytest.raises(OSError, match=r"broken\.png"):
        data.read(row)


def test_damaged_file_is_named(tree):
    (tree / "train" / "cat" / "1.png").write_bytes(b"not an image")
    data = open_dataset(f"imagefolder:{tree}", "train")
    with pytest.raises(ImageReadError, match=r"cat/1\.png: .*no known image format"):
        data.decode(data.read(2), 2)


def test_missing_split_says_what_was_looked_for(tree):
    with pytest.raises(DatasetError, match=r"looked for test/, found train, val"):
        open_dataset(f"imagefolder:{tree}", "test")
    (tree / "val").rename(tree / "holdout")
    with pytest.raises(DatasetError, match=r"val/ and validation/ and val_in_folder/, found holdout, train"):
        open_dataset(f"imagefolder:{tree}", "val")


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "test" / "a").mkdir(parents=True)
    (tmp_path / "test" / "a" / "x.txt").write_text("no")
    with pytest.raises(DatasetError, match=r"no image in its 1 class folders; looked for .*\.jpg .*\.pgm"):
        open_dataset(f"imagefolder:{tmp_path}", "test")
    (tmp_path / "flat").mkdir()
    with pytest.raises(DatasetError, match="no class folder"):
        open_dataset(f"imagefolder:{tmp_path}", "flat")


def test_int_labels_are_refused(tree):
    with pytest.raises(DatasetError, match="list:FILE"):
        open_dataset(f"imagefolder:{tree}", "train", labels="int")


def test_many_files_are_indexed_quickly(tmp_path):
    content = picture(tmp_path / "one.png").read_bytes()
    for c in range(20):
        folder = tmp_path / "train" / f"{c:02d}"
        folder.mkdir(parents=True)
        for i in range(50):
            (folder / f"{i}.png").write_bytes(content)
    data = open_dataset(f"imagefolder:{tmp_path}", "train")
    assert np.array_equal(data.index.labels, np.repeat(np.arange(20), 50))
    assert (data.index.sizes == len(content)).all()


def test_different_classes_in_splits_are_reported_and_a_shared_list_solves_it(tmp_path, capsys):
    for name in ("train/a/1.png", "train/b/1.png", "train/c/1.png", "test/a/1.png", "test/b/1.png"):
        picture(tmp_path / "odd" / name)
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    command = ["--split", "train", "test", "--quiet", "--update-labels"]
    assert main(["encode", f"imagefolder:{tmp_path / 'odd'}", *command]) == 0
    assert "note: odd/train has 3 classes and odd/test 2 (c in one of them alone)" in capsys.readouterr().out
    assert main(["encode", f"imagefolder:{tmp_path / 'odd'},classes={tmp_path / 'names.txt'}", *command]) == 0
    assert "note:" not in capsys.readouterr().out

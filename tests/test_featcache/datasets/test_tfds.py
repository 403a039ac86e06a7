"""``tfds:NAME:DIR`` on TFRecord files written here by hand and (nightly) by TensorFlow Datasets itself."""

import io
import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from featcache.datasets import open_dataset
from featcache.datasets.formats.tfrecord import masked_crc, parse_example
from featcache.errors import DatasetError, ImageReadError
from featcache.prompts import load_subset
from featcache.prompts.imagenet import imagenet_names, imagenet_wnids

CLASSES = ["aircraft_carrier", "The_Eiffel_Tower", "zebra"]


def crc32c(content):
    """CRC-32C, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(content):
    crc = crc32c(content)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def record(content):
    head = struct.pack("<Q", len(content))
    return head + masked(head) + content + masked(content)


def varint(value):
    value &= (1 << 64) - 1
    out = b""
    while value >= 0x80:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def chunk(number, content):
    return varint(number << 3 | 2) + varint(len(content)) + content


def feature(value, packed=True):
    if isinstance(value, bytes):
        return chunk(1, chunk(1, value))
    if isinstance(value, float):
        return chunk(2, chunk(1, struct.pack("<f", value)))
    return chunk(3, chunk(1, varint(value)) if packed else varint(1 << 3) + varint(value))


def example(packed=True, **values):
    entries = [chunk(1, chunk(1, name.encode()) + chunk(2, feature(v, packed))) for name, v in values.items()]
    return chunk(1, b"".join(entries))


def picture(shade, kind="JPEG"):
    file = io.BytesIO()
    Image.new("RGB", (5, 4), (shade, 0, 0)).save(file, kind)
    return file.getvalue()


def prepare(base, shards, name="domainnet", split="test", classes=CLASSES, **more):
    """The files of a prepared data set: `shards` is a list of lists of serialised examples."""
    base.mkdir(parents=True, exist_ok=True)
    for number, examples in enumerate(shards):
        place = base / f"{name}-{split}.tfrecord-{number:05d}-of-{len(shards):05d}"
        place.write_bytes(b"".join(map(record, examples)))
    info = {
        "name": name,
        "fileFormat": "tfrecord",
        "splits": [
            {
                "name": split,
                "shardLengths": [str(len(examples)) for examples in shards],
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
        ],
    }
    (base / "dataset_info.json").write_text(json.dumps(info | more))
    kinds = "tensorflow_datasets.core.features."
    features = {
        "image": {"pythonClassName": f"{kinds}image_feature.Image"},
        "label": {"pythonClassName": f"{kinds}class_label_feature.ClassLabel", "classLabel": {"numClasses": "3"}},
        "domain": {"pythonClassName": f"{kinds}class_label_feature.ClassLabel", "classLabel": {"numClasses": "6"}},
        "file_name": {"pythonClassName": f"{kinds}text_feature.Text"},
    }
    (base / "features.json").write_text(json.dumps({"featuresDict": {"features": features}}))
    if classes:
        (base / "label.labels.txt").write_text("\n".join(classes))
    return base


def test_domainnet_as_prepared_on_disk(tmp_path):
    rows = [
        example(image=picture(shade), label=shade % 3, domain=4, score=0.5, packed=bool(shade % 2))
        for shade in range(7)
    ]
    prepare(tmp_path / "domainnet/real/1.0.0", [rows[:4], [], rows[4:]])
    prepare(tmp_path / "domainnet/real/0.9.0", [rows[:1]])
    data = open_dataset(f"tfds:domainnet/real:{tmp_path}", "test")
    assert (data.name, data.index.classnames) == ("domainnet-real", tuple(CLASSES))
    assert data.index.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert data.index.ids[4] == "domainnet-test.tfrecord-00002-of-00003/000000"
    for row in range(7):
        assert data.read(row) == picture(row)
        assert data.index.sizes[row] == len(picture(row))
    assert data.decode(data.read(6), 6).size == (5, 4)
    with pytest.warns(UserWarning, match="2 of 3 classes"):
        assert len(open_dataset(f"tfds:domainnet/real/0.9.0:{tmp_path}", "test").index) == 1


@pytest.mark.filterwarnings("ignore:.*classes have no image")
def test_imagenet_names_and_file_names(tmp_path, monkeypatch):
    rows = [example(image=picture(n), label=n, file_name=f"val_{n}.JPEG".encode()) for n in (5, 999)]
    prepare(tmp_path / "imagenet2012/5.1.0", [rows], "imagenet2012", "validation", imagenet_wnids())
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    data = open_dataset("tfds:imagenet2012", "val")
    assert data.index.classnames == imagenet_names()
    assert (data.index.ids, data.index.labels.tolist()) == (["val_5.JPEG", "val_999.JPEG"], [5, 999])
    classes = load_subset("imagenet-a")
    rows = [
        example(image=picture(1), label=classes[7], file_name=b"a"),
        example(image=picture(1), label=6, file_name=b"b"),
    ]
    prepare(tmp_path / "imagenet_a/0.1.0", [rows], "imagenet_a", "test", imagenet_wnids())
    data = open_dataset("tfds:imagenet_a", "test")
    assert data.index.labels.tolist() == [7, 0]
    assert data.index.classnames == tuple(imagenet_names()[number] for number in classes)
    prepare(tmp_path / "imagenet_r/0.1.0", [[example(image=b"", label=0)]], "imagenet_r", "test", imagenet_wnids())
    with pytest.raises(DatasetError, match="label 0 is not one of the 200 classes of imagenet-r"):
        open_dataset("tfds:imagenet_r", "test")


def test_repeated_file_names_are_not_used_as_ids(tmp_path):
    rows = [example(image=picture(n), label=n, file_name=b"same.jpg") for n in range(3)]
    data = open_dataset(f"tfds:d:{prepare(tmp_path / 'd/1.0.0', [rows], 'd').parent.parent}", "test")
    assert data.index.ids[2] == "d-test.tfrecord-00000-of-00001/000002"


GOOD = example(image=picture(1), label=0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], "incomplete or damaged TFRecord at byte"),
        (lambda content: content[:5], "incomplete or damaged TFRecord at byte 0"),
        (lambda content: b"\1" + content[1:], "incomplete or damaged TFRecord at byte 0"),
        (lambda content: b"", "0 records, dataset_info.json says 1"),
        (lambda content: content * 2, "2 records, dataset_info.json says 1"),
        (lambda content: record(b"\xff\xff"), "record 0 is not an example"),
        (lambda content: record(b""), "record 0 is not an example with 'image' and 'label'"),
        (lambda content: record(example(image=b"x")), "record 0 is not an example"),
        (lambda content: record(example(image=3, label=0)), "record 0 is not an example"),
        (lambda content: record(example(image=picture(1), label=3)), "labels are out of range"),
        (lambda content: record(example(image=picture(1), label=-1)), "labels are out of range"),
    ],
)
def test_damaged_shards(tmp_path, damage, message):
    base = prepare(tmp_path / "d/1.0.0", [[GOOD]], "d")
    shard = base / "d-test.tfrecord-00000-of-00001"
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(DatasetError, match=message):
        open_dataset(f"tfds:d:{tmp_path}", "test")


@pytest.mark.filterwarnings("ignore:.*classes have no image")
def test_a_flipped_bit_in_an_image_is_detected(tmp_path):
    base = prepare(tmp_path / "d/1.0.0", [[GOOD, example(image=picture(2)[:99], label=0)]], "d")
    data = open_dataset(f"tfds:d:{tmp_path}", "test")
    with pytest.raises(ImageReadError):
        data.decode(data.read(1), 1)
    shard = base / "d-test.tfrecord-00000-of-00001"
    content = bytearray(shard.read_bytes())
    content[200] ^= 1
    shard.write_bytes(content)
    with pytest.raises(OSError, match="differs from its checksum"):
        open_dataset(f"tfds:d:{tmp_path}", "test").read(0)


@pytest.mark.filterwarnings("ignore:.*classes have no image")
def test_missing_versions_splits_and_bad_names_are_refused(tmp_path):
    base = prepare(tmp_path / "d/1.0.0", [[GOOD], [GOOD]], "d")
    for spec, split, message in [
        ("tfds:e", "test", "no version of the data set"),
        ("tfds:", "test", "expected a name such as imagenet2012"),
        ("tfds:../d", "test", "expected a name such as imagenet2012"),
        ("tfds:d", "train", "no split 'train'; expected one of test"),
    ]:
        with pytest.raises(DatasetError, match=message):
            open_dataset(f"{spec}:{tmp_path}", split)
    with pytest.raises(DatasetError, match="ClassLabel features are label, domain; name one with label="):
        open_dataset(f"tfds:d:{tmp_path},label=image", "test")
    (base / "d-test.tfrecord-00001-of-00002").unlink()
    with pytest.raises(DatasetError, match="00001-of-00002: no such shard"):
        open_dataset(f"tfds:d:{tmp_path}", "test")
    prepare(tmp_path / "d/1.0.0", [[GOOD]], "d", fileFormat="array_record")
    with pytest.raises(DatasetError, match="stored as array_record; expected tfrecord"):
        open_dataset(f"tfds:d:{tmp_path}", "test")
    (base / "dataset_info.json").write_text("{")
    with pytest.raises(DatasetError, match="cannot be read"):
        open_dataset(f"tfds:d:{tmp_path}", "test")


@given(st.binary(max_size=40))
def test_checksums_follow_the_definition(content):
    assert struct.pack("<I", masked_crc(content)) == masked(content)


@settings(max_examples=300)
@given(st.binary(max_size=60) | st.binary(max_size=40).map(lambda tail: example(a=b"x")[:-3] + tail))
def test_any_bytes_are_an_example_or_refused(content):
    try:
        features = parse_example(memoryview(content))
    except ValueError:
        return
    for found in features.values():
        assert all(0 <= start <= stop <= len(content) for start, stop in found.spans)
        assert all(-(2**63) <= number < 2**63 for number in found.numbers)


@given(
    st.dictionaries(st.text("ab", max_size=2), st.binary(max_size=200) | st.integers(-(2**63), 2**63 - 1)),
    st.booleans(),
)
def test_written_records_are_read_back(values, packed):
    content = example(packed, **values)
    features = parse_example(memoryview(content))
    assert set(features) == set(values)
    for name, value in values.items():
        if isinstance(value, bytes):
            assert [content[start:stop] for start, stop in features[name].spans] == [value]
        else:
            assert features[name].numbers == [value]


WRITER = """
import sys
import numpy as np
import tensorflow_datasets as tfds
class Domainnet(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="real")]
    def _info(self):
        features = {"image": tfds.features.Image(encoding_format="png"), "file_name": tfds.features.Text(),
                    "label": tfds.features.ClassLabel(names=["aircraft_carrier", "The_Eiffel_Tower", "zebra"])}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))
    def _split_generators(self, manager):
        return {"train": self._generate_examples(23), "test": self._generate_examples(5)}
    def _generate_examples(self, count):
        pixels = np.random.default_rng(count)
        for row in range(count):
            image = pixels.integers(0, 256, (5, 4, 3), dtype=np.uint8)
            yield row, {"image": image, "label": row % 3, "file_name": f"real/{row}.png"}
builder = Domainnet(data_dir=sys.argv[1], config="real")
builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=3))
rows = list(tfds.as_numpy(builder.as_dataset("train", shuffle_files=False)))
np.savez(sys.argv[2], **{key: np.stack([row[key] for row in rows]) for key in ("image", "label", "file_name")})
"""


@pytest.mark.nightly
def test_same_as_tensorflow_datasets_writes_and_reads(tmp_path):
    """FEATCACHE_TFDS_PYTHON is a Python with the library, if it cannot be installed in this one."""
    python = os.environ.get("FEATCACHE_TFDS_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import tensorflow_datasets"], capture_output=True).returncode:
        pytest.skip("tensorflow-datasets is not installed")
    (tmp_path / "code").mkdir()
    for name, text in {"domainnet.py": WRITER, "README.md": "", "CITATIONS.bib": "", "TAGS.txt": ""}.items():
        (tmp_path / "code" / name).write_text(text)
    command = [python, str(tmp_path / "code/domainnet.py"), str(tmp_path / "data"), str(tmp_path / "rows.npz")]
    subprocess.run(command, check=True, capture_output=True)
    rows = np.load(tmp_path / "rows.npz")
    data = open_dataset(f"tfds:domainnet/real:{tmp_path / 'data'}", "train")
    assert len(data.index) == 23
    assert [name.encode() for name in data.index.ids] == rows["file_name"].tolist()
    assert data.index.labels.tolist() == rows["label"].tolist()
    assert data.index.classnames == tuple(CLASSES)
    for row in range(23):
        assert np.array_equal(np.asarray(data.decode(data.read(row), row)), rows["image"][row])

"""``webdataset:PATTERN`` on shards written by the webdataset library, compared with what that library reads."""

import gzip
import io
import json
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from file_server import serving
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from featcache.datasets import open_dataset
from featcache.datasets.formats.tar import expand_braces, expand_shards
from featcache.datasets.sources.webdataset import KEY
from featcache.errors import DatasetError

wds = pytest.importorskip("webdataset")


def picture(shade, kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (5, 4), (shade, 0, 0)).save(file, kind)
    return file.getvalue()


def write(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    with wds.TarWriter(str(path)) as shard:
        for sample in samples:
            shard.write(sample)


def sample(number, **more):
    return {"__key__": f"s{number:07d}", "png": picture(number), "cls": str(number % 3).encode(), **more}


@pytest.fixture
def benchmark(tmp_path):
    """CLIP_benchmark's layout: 0.tar to 10.tar, so that 10 sorts before 2 as text."""
    for shard in range(11):
        write(tmp_path / "wds_pets/test" / f"{shard}.tar", [sample(2 * shard), sample(2 * shard + 1)])
    (tmp_path / "wds_pets/test/nshards.txt").write_text("11\n")
    (tmp_path / "wds_pets/classnames.txt").write_text("cat\ndog\nred fox\n")
    (tmp_path / "wds_pets/zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n")
    return tmp_path / "wds_pets"


def test_same_as_the_library_reads(benchmark):
    data = open_dataset(f"webdataset:{benchmark}", "test")
    assert (data.name, data.split, data.index.classnames) == ("wds_pets", "test", ("cat", "dog", "red fox"))
    urls = [str(benchmark / "test" / f"{shard}.tar") for shard in range(11)]
    reference = list(wds.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert len(reference) == len(data.index) == 22
    for row, theirs in enumerate(reference):
        assert data.index.ids[row].partition("/")[2] == theirs["__key__"]
        assert data.read(row) == theirs["png"]
        assert data.index.sizes[row] == len(theirs["png"])
        assert data.index.labels[row] == int(theirs["cls"])
    assert data.index.ids[2] == "1.tar/s0000002"
    assert np.asarray(data.decode(data.read(7), 7))[0, 0].tolist() == [7, 0, 0]
    assert (data.index.stamps[:2] == (benchmark / "test/0.tar").stat().st_mtime_ns).all()


@pytest.mark.parametrize("pattern", ["test/{0..10}.tar", "{split}/*.tar", "test/{0,1,2,3,4,5,6,7,8,9,10}.tar"])
def test_patterns_name_the_same_samples(benchmark, pattern):
    folder = open_dataset(f"webdataset:{benchmark}", "test").index
    index = open_dataset(f"webdataset:{benchmark}/{pattern}", "test").index
    assert index.ids == folder.ids
    assert index.classnames == folder.classnames


def test_captions_json_and_names(tmp_path):
    write(
        tmp_path / "my shards" / "birds-000.tar",
        [
            {"__key__": "a/ü 1", "jpg": picture(1, "JPEG"), "txt": "ein Vogel", "json": {"kind": "owl", "year": 2016}},
            {"__key__": "a/2", "jpg": picture(2, "JPEG"), "txt": "zwei", "json": {"kind": "auk", "year": 2017}},
        ],
    )
    data = open_dataset(f"webdataset:{tmp_path}/my shards/birds-000.tar,label=kind,metadata=year+kind", "train")
    assert data.name == "birds"
    assert data.index.ids == ["birds-000.tar/a/ü 1", "birds-000.tar/a/2"]
    assert data.index.classnames == ("auk", "owl")
    assert data.index.labels.tolist() == [1, 0]
    assert data.index.metadata["caption"].tolist() == ["ein Vogel", "zwei"]
    assert data.index.metadata["year"].tolist() == [2016, 2017]
    (tmp_path / "my shards" / "classnames.txt").write_text("owl\nauk\n")
    data = open_dataset(f"webdataset:{tmp_path}/my shards/birds-000.tar,label=kind", "train")
    assert data.index.labels.tolist() == [0, 1]


def raw_tar(path, members, cut=None):
    with tarfile.open(path, "w") as shard:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            shard.addfile(entry, io.BytesIO(content))
    if cut:
        path.write_bytes(path.read_bytes()[:cut])
    return f"webdataset:{path}"


PNG = picture(9)
GOOD = [("a.png", PNG), ("a.cls", b"0")]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("../../etc/a.png", PNG)], "points outside the archive"),
        ([("/etc/a.png", PNG)], "points outside the archive"),
        ([*GOOD, ("b.png", PNG), ("b.cls", b"0"), *GOOD], "sample 'a' occurs again"),
        ([*GOOD, ("a.png", PNG)], "'a.png' occurs twice"),
        ([("a.png", PNG)], "no label 'cls' among png"),
        ([("a.png", PNG), ("a.cls", b"")], "no label 'cls' among png, cls"),
        ([("a.cls", b"0")], "0 images among cls"),
        ([*GOOD, ("a.jpg", PNG)], "2 images among png, cls, jpg; expected one"),
        ([("a.png", PNG), ("a.cls", b"-1")], "got label '-1'; expected a class index"),
        ([("a.png", PNG), ("a.cls", b"1000000")], "got label 1000000; expected a class index, 0 to 999,999"),
        ([("a.png", PNG), ("a.cls", b"\xff")], "byte 0 is not UTF-8"),
        ([("a.png", PNG), ("a.json", b"{")], "not JSON"),
        ([("a.png", PNG), ("a.cls", b"0" * 2_000_000)], "expected a label or text of at most"),
        ([("README", b"x"), (".hidden.png", PNG), ("__pins__/a.png", PNG)], "no sample in 1 shards"),
        ([], "no sample in 1 shards|empty"),
    ],
)
def test_invalid_shards_are_refused(tmp_path, members, message):
    spec = raw_tar(tmp_path / "a.tar", members)
    with pytest.raises(DatasetError, match=message):
        open_dataset(f"{spec},label=kind" if "JSON" in message else spec, "train")


def test_links_are_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        entry = tarfile.TarInfo("a.png")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        shard.addfile(entry)
    with pytest.raises(DatasetError, match="is a link"):
        open_dataset(f"webdataset:{tmp_path}/a.tar", "train")


def test_truncated_and_damaged_shards_are_refused(tmp_path):
    """Python's tarfile takes either for the end of the archive, and webdataset silently continues."""
    members = [part for n in range(4) for part in ((f"{n}.png", PNG), (f"{n}.cls", b"0"))]
    whole = tmp_path / "whole.tar"
    assert len(open_dataset(raw_tar(whole, members), "train").index) == 4
    content = whole.read_bytes()
    for cut in (*range(0, 8 * 1024, 512), *range(100, 8 * 1024, 333)):
        whole.write_bytes(content[:cut])
        with pytest.raises(DatasetError, match="not a whole, uncompressed tar file"):
            open_dataset(f"webdataset:{whole}", "train")
    whole.write_bytes(content[:1024] + b"\1" * 512 + content[1536:])
    with pytest.raises(DatasetError, match=r"damaged at byte 1,024"):
        open_dataset(f"webdataset:{whole}", "train")
    whole.write_bytes(gzip.compress(content))
    with pytest.raises(DatasetError, match="not a whole, uncompressed tar file"):
        open_dataset(f"webdataset:{whole}", "train")


def test_a_shard_that_shrinks_after_indexing_is_an_error(tmp_path):
    data = open_dataset(raw_tar(tmp_path / "a.tar", GOOD), "train")
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:540])
    with pytest.raises(OSError, match="the file was cut short"):
        data.read(0)


def test_a_missing_shard_is_named(benchmark):
    (benchmark / "test/7.tar").unlink()
    with pytest.raises(DatasetError, match=r"7\.tar: no such file"):
        open_dataset(f"webdataset:{benchmark}/test/{{0..10}}.tar", "test")
    with pytest.raises(DatasetError, match="no tar file for split 'train'"):
        open_dataset(f"webdataset:{benchmark}", "train")
    with pytest.raises(DatasetError, match="expected a folder or a pattern"):
        open_dataset("webdataset:", "train")


@pytest.fixture
def served(benchmark):
    pytest.importorskip("obstore")
    with serving(benchmark) as address:
        yield address


def test_shards_are_read_over_http(benchmark, served):
    local = open_dataset(f"webdataset:{benchmark}", "test")
    for pattern in ("", "/test/{0..10}.tar"):
        remote = open_dataset(f"webdataset:{served}{pattern}", "test", name="pets")
        assert remote.index.ids == local.index.ids
        assert remote.index.classnames == local.index.classnames
        assert np.array_equal(remote.index.labels, local.index.labels)
        assert [remote.read(row) for row in (21, 0, 7)] == [local.read(row) for row in (21, 0, 7)]
        assert remote.index.stamps[0] == 1795255200 * 10**9
    with pytest.raises(DatasetError, match=r"99\.tar: (no such file|cannot be read)"):
        open_dataset(f"webdataset:{served}/test/{{9,99}}.tar", "test")
    with pytest.raises(DatasetError, match=r"expected addresses of tar files"):
        open_dataset(f"webdataset:{served}", "train")
    with pytest.raises(DatasetError, match=r"without '\?'"):
        open_dataset(f"webdataset:{served}/0.tar?token=x.tar", "train")


def test_servers_without_ranges_or_out_of_reach_are_reported(benchmark):
    pytest.importorskip("obstore")
    handler = partial(SimpleHTTPRequestHandler, directory=str(benchmark))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        with pytest.raises(DatasetError, match=r"0\.tar: cannot be read .*cannot send parts of files"):
            open_dataset(f"webdataset:http://127.0.0.1:{server.server_port}/test/0.tar", "test")
        server.shutdown()
        thread.join()
    with pytest.raises(DatasetError, match=r"0\.tar: cannot be read .*check the address$"):
        open_dataset(f"webdataset:http://127.0.0.1:{server.server_port}/test/0.tar", "test")


def test_shards_are_read_from_s3(benchmark, monkeypatch):
    pytest.importorskip("obstore")
    server_module = pytest.importorskip("moto.server")
    import obstore

    from featcache.store.places.s3 import client

    server = server_module.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        import boto3

        boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket="pets")
        for shard in range(2):
            obstore.put(client("pets"), f"t/{shard}.tar", (benchmark / "test" / f"{shard}.tar").read_bytes())
        data = open_dataset("webdataset:s3://pets/t/{0..1}.tar", "test")
        local = open_dataset(f"webdataset:{benchmark}/test/{{0..1}}.tar", "test")
        assert data.index.ids == local.index.ids
        assert data.index.classnames == ("0", "1", "2")
        assert [data.read(row) for row in range(4)] == [local.read(row) for row in range(4)]
    finally:
        server.stop()


@pytest.mark.parametrize("pattern", ["{", "a{b", "a}b", "{a}", "{3..1}", "{{a,b},c}", "{..}", "{0..99999999}"])
def test_invalid_brace_patterns_are_refused(pattern):
    with pytest.raises(DatasetError):
        expand_shards(f"http://x/{pattern}.tar", "train")


@given(st.text("{}.,0129ab", max_size=12))
def test_braces_as_the_library_expands_them(pattern):
    braceexpand = pytest.importorskip("braceexpand").braceexpand
    try:
        ours = expand_braces(pattern)
    except DatasetError:
        return
    assert ours == list(braceexpand(pattern))


@given(st.text("ab./_-", max_size=10))
def test_names_are_split_as_the_library_splits_them(name):
    from webdataset.tariterators import base_plus_ext

    found = KEY.fullmatch(name)
    if found:
        assert found.groups() == base_plus_ext(name)


def test_json_member_of_another_kind(tmp_path):
    spec = raw_tar(tmp_path / "a.tar", [("a.png", PNG), ("a.json", json.dumps([1]).encode())])
    with pytest.raises(DatasetError, match="no label 'kind' among png, json"):
        open_dataset(f"{spec},label=kind", "train")


def test_a_folder_of_shards_that_are_named_by_their_split(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for name, first in (("train-000000", 0), ("train-000001", 4), ("trainval-000000", 8), ("val_0", 12), ("test", 16)):
        write(folder / f"{name}.tar", [sample(number) for number in range(first, first + 4)])
    found = {split: [path.rpartition("/")[2] for path in expand_shards(str(folder), split)] for split in
             ("train", "val", "test")}  # fmt: skip
    assert found == {"train": ["train-000000.tar", "train-000001.tar"], "val": ["val_0.tar"], "test": ["test.tar"]}
    assert len(open_dataset(f"webdataset:{folder}", "train").index) == 8
    with pytest.raises(DatasetError, match=r"for split 'dev'; looked for .*dev-000000.tar, found test.tar, train-"):
        expand_shards(str(folder), "dev")

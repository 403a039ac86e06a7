"""What the blocks of the documentation find in their folder: small data in the published layouts, stores, stand-ins.

A need makes files in the scratch folder (the working directory; stores lie in ``cache``), or replaces what a test must
not reach, such as pretrained weights. It may also say what to replace in the block's text, and which names a Python
block may use.
"""

import io
import json
import pickle
import shutil
import tarfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from clip_models import CONFIG, RESNET, make_model, write_folder
from diffusion_models import Draft
from docs_pages import ROOT, blocks
from file_server import serving
from foreign_checkpoints import write_ckpt
from image_sources import as_hugging_face_saves, example, record
from PIL import Image

from featcache.cli.main import main
from featcache.prompts import load_classnames
from ft.recipes import RECIPES, load_recipe

MODELS = ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "RN50")
CATS = ("cat", "dog")
PACS = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")


@dataclass
class Scratch:
    """The folder of one block; `shared` keeps what several blocks need."""

    base: Path
    shared: Path
    patch: pytest.MonkeyPatch
    later: ExitStack
    replace: dict[str, str] = field(default_factory=dict)
    names: dict[str, Any] = field(default_factory=dict)


NEEDS: dict[str, Callable[[Scratch], None]] = {}


def need(function: Callable[[Scratch], None]) -> Callable[[Scratch], None]:
    """Make a function a need, under its name with hyphens."""
    NEEDS[function.__name__.replace("_", "-")] = function
    return function


def run(*words: str) -> None:
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        code = main(list(words))
    assert code == 0, f"{' '.join(words)}: {said.getvalue()}"


def png(number: int = 0) -> bytes:
    """A noisy picture; even numbers look alike, and so do odd ones."""
    pixels = np.random.default_rng(number).integers(0, 128, (16, 16, 3), dtype=np.uint8) + np.uint8(100 * (number % 2))
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def class_folders(base: Path, classes: tuple[str, ...] = CATS, each: int = 3, first: int = 0) -> None:
    for c, name in enumerate(classes):
        (base / name).mkdir(parents=True)
        for number in range(each):
            place = first + len(classes) * number + c
            (base / name / f"{place:04d}.png").write_bytes(png(place))


def shard(path: Path, first: int) -> None:
    """A tar file of six samples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as held:
        for number in range(first, first + 6):
            for suffix, content in (("png", png(number)), ("cls", str(number % 2).encode())):
                entry = tarfile.TarInfo(f"{number:04d}.{suffix}")
                entry.size = len(content)
                held.addfile(entry, io.BytesIO(content))


# Models.


@need
def pretrained(scratch: Scratch) -> None:
    """Register small random models under OpenAI's names and tags."""

    text = {"text_cfg": CONFIG["text_cfg"] | {"context_length": 77}}
    resnet = text | {"vision_cfg": RESNET}

    def weights(tag: Mapping[str, Any], **_: Any) -> str:
        quick, kind = bool(tag.get("quick_gelu")), "RN50" if "RN50" in tag.get("url", "") else "ViT"
        path = scratch.base / f"weights-{kind}-{quick}.pt"
        if not path.exists():
            model = make_model(quick_gelu=quick, **(resnet if kind == "RN50" else text))
            torch.save(model.state_dict(), path)
        return str(path)

    scratch.patch.setattr(open_clip.factory, "download_pretrained", weights)
    for name in MODELS:
        for full, quick in ((name, False), (f"{name}-quickgelu", True)):
            if full in open_clip.factory._MODEL_CONFIGS:
                changes = (resnet if name == "RN50" else text) | {"quick_gelu": quick}
                scratch.patch.setitem(open_clip.factory._MODEL_CONFIGS, full, CONFIG | changes)


@need
def diffusion(scratch: Scratch) -> None:
    """Flat pictures instead of Stable Diffusion's, and one or two per class."""
    scratch.patch.setattr("ft.generation.diffusion.Painter", lambda *_: Draft())
    scratch.replace["featcache generate"] = "featcache generate --images 1"
    scratch.replace["--images 4"] = "--images 1"


@need
def tiny_run(scratch: Scratch) -> None:
    """Two steps of `tiny`."""
    scratch.replace["--recipe regft"] = "--recipe regft --steps 2 --batch-size 4 --model tiny"


@need
def short_runs(scratch: Scratch) -> None:
    """Two steps of every recipe, and one template instead of 80."""
    for recipe in RECIPES:
        templates = " --templates bare" if load_recipe(recipe).get("head") == "zero_shot" and recipe != "regft" else ""
        size = 3 if recipe == "regft" else 2  # of three pictures
        run = f"--recipe {recipe} --steps 2 --eval-every 1 --batch-size {size}{templates}"
        scratch.replace[f"--recipe {recipe}"] = run
    scratch.replace["--templates openai-imagenet"] = "--templates simple"


@need
def lipsum_checkpoint(scratch: Scratch) -> None:
    """A best_acc.ckpt of the small model."""
    write_ckpt(scratch.base / "best_acc.ckpt", make_model(seed=1).state_dict())


# Data in published layouts.


@need
def pets(scratch: Scratch) -> None:
    """Folders ``pets`` and ``flowers``, with three splits each."""
    scratch.replace["/data/"] = ""
    for name, classes in (("pets", CATS), ("flowers", ("rose", "tulip"))):
        for number, split in enumerate(("train", "val", "test")):
            class_folders(scratch.base / name / split, classes, 8, 1000 * number)


@need
def imagefolder(scratch: Scratch) -> None:
    """A folder DIR with a training split."""
    class_folders(scratch.base / "DIR" / "train")


@need
def imagenet(scratch: Scratch) -> None:
    """Three classes of ImageNet in DIR."""
    for split in ("train", "val_in_folder"):
        class_folders(scratch.base / "DIR" / split, ("n01440764", "n02123045", "n02129165"), 2, 100)


@need
def webdatasets(scratch: Scratch) -> None:
    """Shards in CLIP_benchmark's layout, and two behind a server on this machine."""
    for number in range(2):
        shard(scratch.base / "wds" / "imagenetv2" / "test" / f"{number}.tar", 10 * number)
        shard(scratch.base / "served" / f"train-{number:03d}.tar", 10 * number)
    for folder in ("wds/imagenetv2", "served"):
        (scratch.base / folder / "classnames.txt").write_text("cat\ndog\n")
    scratch.replace["https://host/{split}-{000..127}"] = (
        f"{scratch.later.enter_context(serving(scratch.base / 'served'))}/{{split}}-{{000..001}}"
    )


@need
def hugging_face(scratch: Scratch) -> None:
    """``saved_animals``, as save_to_disk writes a DatasetDict."""
    datasets = pytest.importorskip("datasets")
    for split in ("train", "test"):
        as_hugging_face_saves(scratch.base / split, {f"{number}.png": png(number) for number in range(4)})
    splits = {split: datasets.load_from_disk(str(scratch.base / split / "saved")) for split in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(str(scratch.base / "saved_animals"))


@need
def cifar(scratch: Scratch) -> None:
    """CIFAR-10's files below ``~/data``, in small."""
    from torchvision import datasets

    folder = scratch.base / "home" / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    chance = np.random.default_rng(0)
    for name in ("data_batch_1", "test_batch"):
        content = {"data": chance.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [3, 0, 1, 2]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["plane", "car", "bird", "cat"]}))
    scratch.patch.setattr(datasets.CIFAR10, "train_list", [("data_batch_1", None)])
    scratch.patch.setattr(datasets.CIFAR10, "test_list", [("test_batch", None)])
    scratch.patch.setattr(datasets.CIFAR10, "meta", datasets.CIFAR10.meta | {"md5": None})


@need
def tfds(scratch: Scratch) -> None:
    """``domainnet/real`` below ``~/tensorflow_datasets``."""
    folder = scratch.base / "home" / "tensorflow_datasets" / "domainnet" / "real" / "1.0.0"
    folder.mkdir(parents=True)
    splits = []
    for split in ("train", "test"):
        content = b"".join(record(example(png(number))) for number in range(3))
        (folder / f"domainnet-{split}.tfrecord-00000-of-00001").write_bytes(content)
        splits.append({"name": split, "shardLengths": ["3"]})
    (folder / "dataset_info.json").write_text(json.dumps({"name": "domainnet", "splits": splits}))
    kind = "tensorflow_datasets.core.features."
    features = {
        "image": {"pythonClassName": f"{kind}image_feature.Image"},
        "label": {"pythonClassName": f"{kind}class_label_feature.ClassLabel", "classLabel": {"numClasses": "345"}},
    }
    (folder / "features.json").write_text(json.dumps({"featuresDict": {"features": features}}))
    (folder / "label.labels.txt").write_text("".join(f"{name}\n" for name in load_classnames("domainnet")))


@need
def table(scratch: Scratch) -> None:
    """``wild.csv`` with three splits, regions and years."""
    lines = ["path,species,split,region,year"]
    for number in range(12):
        (scratch.base / f"{number}.png").write_bytes(png(number))
        split = ("train", "val", "test")[number // 4]
        lines.append(f"{number}.png,{CATS[number % 2]},{split},{('Asia', 'Africa')[number // 2 % 2]},{2015 + number}")
    (scratch.base / "wild.csv").write_text("\n".join(lines) + "\n")


@need
def tagged_digits(scratch: Scratch) -> None:
    """Pictures of digits, and a table of what applies to each: even, large, both or neither."""
    from sklearn.datasets import load_digits

    digits, lines = load_digits(), ["path,tags,split"]
    for row, (picture, number) in enumerate(zip(digits.images[:120], digits.target, strict=False)):
        Image.fromarray((255 - 15 * picture).astype(np.uint8)).save(scratch.base / f"{row}.png")
        tags = [name for name, applies in (("even", number % 2 == 0), ("large", number > 4)) if applies]
        lines.append(f"{row}.png,{'|'.join(tags)},{('train', 'val', 'test')[row % 3]}")
    (scratch.base / "tags.csv").write_text("\n".join(lines) + "\n")


@need
def pacs(scratch: Scratch) -> None:
    for number, domain in enumerate(("art_painting", "cartoon", "photo", "sketch")):
        class_folders(scratch.base / "home" / "PACS" / domain, PACS, 1, 100 * number)


@need
def objectnet(scratch: Scratch) -> None:
    """Two of ObjectNet's classes, one of them unknown to ImageNet."""
    base = scratch.base / "home" / "objectnet-1.0"
    class_folders(base / "images", ("backpack", "band_aid"), 1)
    mappings = {
        "folder_to_objectnet_label.json": {"backpack": "Backpack", "band_aid": "Band Aid"},
        "objectnet_to_imagenet_1k.json": {"Backpack": "backpack, back pack"},
        "pytorch_to_imagenet_2012_id.json": {"414": 0},
    }
    (base / "mappings").mkdir()
    for name, content in mappings.items():
        (base / "mappings" / name).write_text(json.dumps(content))
    (base / "mappings" / "imagenet_to_label_2012_v2").write_text("backpack, back pack \n")


@need
def coop_dtd(scratch: Scratch) -> None:
    """CoOp's split file of the textures, and ``classes.txt``."""
    class_folders(scratch.base / "dtd" / "dtd", ("woven", "banded"), 1)
    rows = [[f"dtd/{name}/000{label}.png", label, name] for label, name in enumerate(("woven", "banded"))]
    path = scratch.base / "dtd" / "split_zhou_DescribableTextures.json"
    path.write_text(json.dumps({"train": rows, "val": [], "test": []}))
    (scratch.base / "classes.txt").write_text("banded\nwoven\n")


@need
def scans(scratch: Scratch) -> None:
    (scratch.base / "scans").mkdir()
    for number in range(3):
        (scratch.base / "scans" / f"{number}.png").write_bytes(png(number))


@need
def foreign_features(scratch: Scratch) -> None:
    """Features of another program in OUT_DIR, vectors of classes, and the class names."""
    folder = scratch.base / "OUT_DIR"
    folder.mkdir()
    torch.save(torch.randn(6, 8), folder / "features_train.pt")
    torch.save(torch.arange(6) % 2, folder / "targets_train.pt")
    torch.save(100 * torch.eye(8)[:, :2], scratch.base / "text_weights.pt")
    (scratch.base / "classes.txt").write_text("cat\ndog\n")


# The layouts of docs/switching.md.


@need
def lipsum_data(scratch: Scratch) -> None:
    """``*_x224`` arrays in small, and a best_acc.ckpt."""
    chance = np.random.default_rng(0)
    for name in ("DomainNetReal", "DomainNetSketch"):
        folder = scratch.base / "lipsum_data" / f"{name}_x224"
        folder.mkdir(parents=True)
        np.save(folder / "test_images.npy", chance.integers(0, 256, (4, 32, 32, 3)).astype(np.float32))
        np.save(folder / "test_labels.npy", chance.integers(0, 345, 4))
    lipsum_checkpoint(scratch)


@need
def regft_data(scratch: Scratch) -> None:
    """A prompt-style file, a file of sentences, and CoOp's split of EuroSAT."""
    names = ["Forest", "River", "Annual Crop Land"]
    styles = {"eurosat": {"template": "a centered satellite photo of {}.", "classnames": names}}
    (scratch.base / "prompt_styles.json").write_text(json.dumps(styles))
    (scratch.base / "gpt_file").mkdir()
    sentences = {name: [f"{name} from above.", "Seen from far away."] for name in names}
    (scratch.base / "gpt_file" / "eurosat_prompt.json").write_text(json.dumps(sentences))
    class_folders(scratch.base / "eurosat" / "2750", tuple(names), 1)
    rows = [[f"2750/{name}/000{label}.png", label, name] for label, name in enumerate(names)]
    (scratch.base / "eurosat" / "split_zhou_EuroSAT.json").write_text(
        json.dumps({"train": [], "val": [], "test": rows})
    )


@need
def mnist_lists(scratch: Scratch) -> None:
    """The example's four lists, and two images per digit."""
    words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    for number, split in enumerate(("train", "test")):
        lines: dict[str, list[str]] = {"0": [], "zero": []}
        class_folders(scratch.base / "data" / "MNIST" / split, tuple(map(str, range(10))), 2, 100 * number)
        for path in sorted((scratch.base / "data" / "MNIST" / split).glob("*/*.png")):
            place, digit = path.relative_to(scratch.base), int(path.parent.name)
            lines["0"].append(f"{place} {digit}")
            lines["zero"].append(f"{place} {words[digit]}")
        for kind, rows in lines.items():
            (scratch.base / "data" / f"MNIST_{split}_{kind}.txt").write_text("\n".join(rows) + "\n")


@need
def wise_ft_data(scratch: Scratch) -> None:
    """ImageNet and three shifts, as below ``--data-location``."""
    wnids = ("n01443537", "n01484850", "n02129165")  # all in ImageNet-R; the last not in ImageNet-A
    for number, folder in enumerate(("imagenet/train", "imagenet/val_in_folder", "imagenet-r", "sketch")):
        class_folders(scratch.base / folder, wnids, 2, 100 * number)
    class_folders(scratch.base / "imagenet-a", ("n01498041", "n01531178"), 2, 500)
    images, labels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8), np.arange(4)
    for name in ("CIFAR-10.1", "CIFAR-10.2"):
        (scratch.base / name).mkdir()
    for kind, values in (("data", images), ("labels", labels)):
        np.save(scratch.base / "CIFAR-10.1" / f"cifar10.1_v6_{kind}.npy", values)
    held = np.array({"images": images, "labels": labels}, dtype=object)
    np.save(scratch.base / "CIFAR-10.2" / "cifar102_test.npy", held, allow_pickle=True)


@need
def office_home(scratch: Scratch) -> None:
    for number, domain in enumerate(("Art", "Clipart", "Product", "RealWorld")):
        class_folders(scratch.base / "OfficeHome" / domain, ("Alarm_Clock", "Bed"), 2, 100 * number)
    (scratch.base / "OfficeHome" / "classes.txt").write_text("Alarm_Clock\nBed\n")  # two of the 65


# Stores and heads.


@need
def pets_stores(scratch: Scratch) -> None:
    """Stores of all splits of pets and flowers, and of their class names."""
    pets(scratch)
    for name in ("pets", "flowers"):
        run("encode", f"imagefolder:{name}", "--split", "train", "val", "test", "--quiet")
        run("text", f"imagefolder:{name}", "--quiet")


@need
def numbered_stores(scratch: Scratch) -> None:
    """Stores of classes that have numbers for names."""
    for number, split in enumerate(("train", "test")):
        class_folders(scratch.base / "pets" / split, ("n01", "n02"), 4, 1000 * number)
    run("encode", "imagefolder:pets", "--split", "train", "test", "--quiet")
    [manifest] = [path for path in Path("cache").glob("images/*/*/manifest.json") if '"train"' in path.read_text()]
    scratch.replace["#3f2a91c0"] = f"#{manifest.parent.name[:8]}"


@need
def digits_stores(scratch: Scratch) -> None:
    """Stores of digits and their names, made once."""
    if not scratch.shared.exists():
        _encode_digits()
        shutil.copytree("cache", scratch.shared)
    shutil.copytree(scratch.shared, "cache", dirs_exist_ok=True)


def _encode_digits() -> None:
    run("encode", "digits", "--split", "train", "val", "test", "--quiet")
    run("encode", "digits:inverted", "--split", "test", "--quiet")
    run("text", "digits", "--templates", "digits", "--quiet")


@need
def digits_heads(scratch: Scratch) -> None:
    run("fit", "zero_shot", "texts/digits", "-o", "zs.safetensors")
    run("fit", "ridge", "digits/train", "-o", "ridge.safetensors")


@need
def wise_ft_results(scratch: Scratch) -> None:
    """``wise-ft/results.jsonl``, as its README's command appends to it, in short."""
    (scratch.base / "wise-ft").mkdir()
    row = {"model": "ViT-B/32", "results_db": "results.jsonl", "freeze_encoder": False}
    rows = [row | {"alpha": a, "ImageNet:top1": 0.63 + a / 8, "ImageNetV2:top1": 0.56 + a / 9} for a in (0.0, 0.5, 1.0)]
    (scratch.base / "wise-ft" / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@need
def sweep_file(scratch: Scratch) -> None:
    """``sweep.toml`` as the page shows it."""
    [shown] = [block for block in blocks(ROOT / "docs" / "heads.md") if block.language == "toml"]
    (scratch.base / "sweep.toml").write_text(shown.text)


@need
def s3(scratch: Scratch) -> None:
    """A server of objects on this machine, with the bucket ``features``."""
    import boto3

    moto_server = pytest.importorskip("moto.server")
    server = moto_server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    scratch.later.callback(server.stop)
    place = "http://{}:{}".format(*server.get_host_and_port())
    scratch.patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=place, **keys).create_bucket(Bucket="features")
    scratch.replace |= {
        "http://minio:9000": place,
        "_ID=...": "_ID=test",
        "_KEY=...": "_KEY=test",
        "REGION=...": "REGION=us-east-1",
    }


@need
def array_job(scratch: Scratch) -> None:
    scratch.patch.setenv("SLURM_ARRAY_TASK_ID", "0")
    scratch.patch.setenv("SLURM_ARRAY_TASK_COUNT", "1")


# Names of Python blocks.


@need
def python_kernels(scratch: Scratch) -> None:
    """Random features and weights."""
    make = torch.Generator().manual_seed(0)
    unit = partial(torch.nn.functional.normalize, dim=-1)
    features = unit(torch.randn(20, 8, generator=make))
    names = {
        "X": features,
        "y": torch.arange(20) % 2 * 2,
        **{name: unit(torch.randn(3, 8, generator=make)) for name in ("head_a", "head_b", "zero_shot", "probe")},
        "templates": unit(torch.randn(4, 3, 8, generator=make)),
        "W": unit(torch.randn(5, 8, generator=make)),
        "imagenet_r_indices": [0, 2, 3],
        "features": features.clone().requires_grad_(),
        "weights": torch.randn(3, 8, generator=make, requires_grad=True),
        "labels": torch.arange(20) % 3,
    }
    scratch.names |= names


@need
def python_stores(scratch: Scratch) -> None:
    """Packages, and the stores and heads of digits under their usual names."""
    import zarr

    import featcache
    import heads
    from featcache.store import find_store

    stores = {split: find_store(f"digits/{split}", Path("cache")) for split in ("train", "val", "test")}
    texts = find_store("texts/digits", Path("cache"))
    zero_shot, ridge = heads.ZeroShot().fit(texts), heads.Ridge().fit(stores["train"])
    scratch.names |= {name: getattr(heads, name) for name in heads.__all__ if not name.startswith("_")}
    scratch.names |= {"featcache": featcache, "heads": heads, "zarr": zarr, "texts": texts, **stores}
    scratch.names |= {
        "store": stores["train"],
        "zero_shot": zero_shot,
        "ridge": ridge,
        "model": torch.nn.Linear(64, 10),
    }


@need
def python_regression(scratch: Scratch) -> None:
    """Numeric targets, and blocks of rows."""
    chance = np.random.default_rng(0)
    X = chance.standard_normal((60, 512)).astype(np.float32)
    labels = np.arange(60) % 2
    scratch.names |= {"X": X, "ages": X[:, 0] + 40, "X_test": X[:9], "ages_test": X[:9, 0] + 40, "names": CATS}
    scratch.names["blocks"] = lambda: iter([(X[:30], labels[:30]), (X[30:], labels[30:])])


@need
def python_names(scratch: Scratch) -> None:
    """The packages."""
    import featcache
    import heads

    scratch.names |= {"featcache": featcache, "heads": heads}


@need
def flat(scratch: Scratch) -> None:
    """Class folders without splits."""
    class_folders(scratch.base / "flat", each=10)


@need
def lists(scratch: Scratch) -> None:
    """``train.txt`` and ``test.txt`` beside pets."""
    pets(scratch)
    for split in ("train", "test"):
        files = sorted((scratch.base / "pets" / split).glob("*/*.png"))
        lines = [f"{file.relative_to(scratch.base)} {file.parent.name}\n" for file in files]
        (scratch.base / f"{split}.txt").write_text("".join(lines))


@need
def npz(scratch: Scratch) -> None:
    """Features of two classes in ``train.npz`` and ``test.npz``."""
    chance = np.random.default_rng(0)
    for split in ("train", "test"):
        labels = np.arange(40) % 2
        features = chance.standard_normal((40, 8)) + 3 * labels[:, None] * np.eye(8)[0]
        np.savez(scratch.base / f"{split}.npz", features=features.astype(np.float32), labels=labels)


@need
def shards(scratch: Scratch) -> None:
    """A folder of shards that are named by their split."""
    for split, first in (("train", 0), ("test", 100)):
        for number in range(2):
            shard(scratch.base / "shards" / f"{split}-{number:06d}.tar", first + 10 * number)


@need
def python_held(scratch: Scratch) -> None:
    """A live Hugging Face data set, pictures with names, and a network."""
    import datasets
    from torchvision import transforms

    import featcache
    import heads

    pictures, names = [Image.open(io.BytesIO(png(number))) for number in range(8)], [*CATS] * 4
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=CATS))
    dataset = datasets.Dataset.from_dict({"image": pictures, "label": [0, 1] * 4}, features=features)
    steps = [transforms.Resize(8), transforms.ToTensor()]

    def mnist(root: str, train: bool) -> list[tuple[Image.Image, int]]:
        return [(picture, row % 2) for row, picture in enumerate(pictures)]

    scratch.names |= {
        "featcache": featcache,
        "heads": heads,
        "dataset": dataset,
        "MNIST": mnist,
        "pictures": pictures,
        "names": names,
    }
    scratch.names |= {"network": torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 5))}
    scratch.names["transform"] = transforms.Compose(steps)


@need
def python_path(scratch: Scratch) -> None:
    """The path of a store."""
    scratch.replace["cache/images/..."] = str(scratch.names["store"].path)


@need
def python_views(scratch: Scratch) -> None:
    """A store of two pictures of each of thirty animals, and heads of it."""
    import featcache
    import heads

    lines = ["path,label,image"]
    for number in range(60):
        (scratch.base / f"{number}.png").write_bytes(png(number))
        lines.append(f"{number}.png,{CATS[number % 2]},{number % 30}")
    (scratch.base / "views.csv").write_text("\n".join(lines) + "\n")
    store = featcache.encode("table:views.csv,metadata=image", "all", model="tiny")
    zero_shot = heads.ZeroShot().fit(featcache.embed_text(CATS, ["a {}."], model="tiny"))
    scratch.names |= {name: getattr(heads, name) for name in heads.__all__ if not name.startswith("_")}
    scratch.names |= {"heads": heads, "store": store, "val": store, "zero_shot": zero_shot}
    scratch.names["ridge"] = heads.Ridge().fit(store)


@need
def python_models(scratch: Scratch) -> None:
    """Two models' stores of the same pictures, and their heads."""
    import featcache
    import heads

    pets(scratch)
    scratch.names |= {"heads": heads}
    for seed, name in enumerate(("b32", "l14")):
        model = write_folder(scratch.base / name, make_model(seed))
        train, val = (featcache.encode("imagefolder:pets", split, model=model) for split in ("train", "val"))
        texts = featcache.embed_text(train.classnames, ["a {}.", "the {}."], model=model)
        scratch.names |= {f"store_{name}": train, f"val_{name}": val, "texts": texts, "unlabelled": train}
        scratch.names |= {f"zero_shot_{name}": heads.ZeroShot().fit(texts), f"head_{name}": heads.Ridge().fit(train)}


@need
def on_this_device(scratch: Scratch) -> None:
    scratch.replace['"cuda"'] = '"cpu"'

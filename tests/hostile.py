"""Hostile inputs for all parts of the command line, and a runner that checks the rules for each.

``python tests/hostile.py FOLDER [EVERY [FIRST]]`` runs every EVERY-th case in this process and prints one JSON object
a case: its name, exit code, seconds, peak memory and what broke a rule, if anything did.

The rules: no exception leaves `main`; an error is one line on stderr with exit code 2 to 5; no case takes longer than
`SECONDS` or more than `NBYTES` of memory on top of what the loaded libraries take.
"""

import contextlib
import dataclasses
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import tarfile
import traceback
import zipfile
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from featcache.cli.main import VERBS, main
from featcache.datasets import DATASETS
from featcache.transfer.formats import FOLDERS

SECONDS, NBYTES = 10, 1 << 30
PRETRAINED = "hostile-arch"
TINY = Path(__file__).parents[1] / "featcache" / "encoders" / "tiny"


@dataclasses.dataclass
class Case:
    """A command line and its environment."""

    name: str
    words: list[str]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


WORDS = (
    "",
    "x",
    "[]",
    "{}",
    '""',
    "null",
    "nan",
    "-1",
    "1e999",
    "9" * 40,
    "\udcff",
    "\0",
    "a" * 5000,
    "../..",
    "\x1b[2J",
)
"""Values given to flags."""
VALUES: tuple[Any, ...] = (None, True, "x", "", -1, 0, 1.5, 10**30, float("nan"), [], [[]], {}, {"a": [1]}, ["x"])
"""Values put into fields of JSON files."""
MISSING = object()


def contents(good: bytes) -> dict[str, bytes]:
    """Empty, damaged, truncated and foreign files."""
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": 1}))
        archive.writestr("archive/version", "3")
    torched, wrong = io.BytesIO(), io.BytesIO()
    torch.save({"a": torch.zeros(2), 3: "x", "state_dict": {"b": 1}}, torched)
    torch.save([1, 2], wrong)
    jitted = io.BytesIO()
    with zipfile.ZipFile(jitted, "w") as archive:
        archive.writestr("a/constants.pkl", b"\x80\x02.")
    return {
        "empty": b"",
        "one byte": b"\x80",
        "garbage": random.Random(1).randbytes(4000),
        "text": b"no such thing\n" * 9,
        "pickle": pickle.dumps({"weights": Path("x")}),
        "old pickle": pickle.dumps([1, 2, 3], 2),
        "zip": zipped.getvalue(),
        "no state dict": torched.getvalue(),
        "a list": wrong.getvalue(),
        "cut torch": torched.getvalue()[:-30],
        "fake torchscript": jitted.getvalue(),
        "cut": good[: len(good) // 2],
        "cut header": good[:20],
        "one bit": good[:40] + bytes([good[40] ^ 1]) + good[41:] if len(good) > 41 else good,
        "huge header": struct.pack("<Q", 2**60) + b"{}",
        "no header": struct.pack("<Q", 2) + b"{}",
        "overlap": _safetensors({"a": [0, 8], "b": [0, 8]}, bytes(8)),
        "beyond": _safetensors({"a": [0, 2**50]}, b""),
        "deep json": b"[" * 100_000,
        "null json": b"null",
        "utf-16": "weights".encode("utf-16"),
    }


def _safetensors(tensors: dict[str, list[int]], data: bytes) -> bytes:
    header = {
        name: {"dtype": "F32", "shape": [(end - start) // 4], "data_offsets": [start, end]}
        for name, (start, end) in tensors.items()
    }
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


class Corpus:
    """All cases and the valid files that they are made from, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 0
        os.chdir(folder)
        os.environ.update(
            FEATCACHE_ROOT=str(folder / "cache"),
            AWS_ENDPOINT_URL="http://127.0.0.1:9",
            AWS_EC2_METADATA_DISABLED="true",
        )
        os.environ.update(AWS_ACCESS_KEY_ID="x", AWS_SECRET_ACCESS_KEY="x", AWS_REGION="x", HF_HUB_OFFLINE="1")
        import open_clip

        arch = json.loads((TINY / "open_clip_config.json").read_text())["model_cfg"]
        (folder / f"{PRETRAINED}.json").write_text(json.dumps(arch))
        open_clip.add_model_config(folder / f"{PRETRAINED}.json")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            for words in (
                "encode digits --split test --quiet",
                "text digits --templates digits --quiet",
                "fit ridge digits/test --set alphas=[1.0] -o ridge.safetensors",
                "fit knn digits/test -o knn.safetensors",
                "fit tip_adapter digits/test texts/digits -o tip_adapter.safetensors",
                "export digits/test out",
                "export digits/test out.csv",
                "pack digits/test packed.tar",
                f"encode {tagged(folder)},labels=tags --split all --quiet",
                "fit multilabel_ridge tagged/all -o multilabel.safetensors --set alphas=[1.0]",
                "fit label_propagation digits/test texts/digits -o transductive.safetensors",
            ):
                code = main(words.split())
                assert code == 0, words
        Image.new("RGB", (8, 8)).save(folder / "x.png")
        shutil.copytree("cache", "sound")

    def restore(self, verb: str) -> None:
        """Restore the stores after a verb that changes them."""
        if verb in ("rename", "relabel", "rm", "gc", "verify"):
            shutil.rmtree("cache", ignore_errors=True)
            shutil.copytree("sound", "cache")

    def file(self, content: bytes, suffix: str = "") -> str:
        """A new file; returns its path."""
        self.number += 1
        path = self.folder / f"file{self.number}{suffix}"
        path.write_bytes(content)
        return str(path)

    def cases(self) -> Iterator[Case]:
        """All cases."""
        for door in (
            self.checkpoints,
            self.model_folders,
            self.heads,
            self.settings,
            self.recipes,
            self.plans,
            self.flags,
            self.environment,
            self.addresses,
            self.texts,
            self.data,
            self.foreign,
            self.folders,
            self.packed,
            self.tables,
            self.places,
        ):
            for case in door():
                yield dataclasses.replace(case, name=f"{door.__name__}: {case.name}")

    def checkpoints(self) -> Iterator[Case]:
        """Other files instead of checkpoints and heads."""
        doors: dict[str, Callable[[str], list[str]]] = {
            "pretrained": lambda f: ["encode", "digits", "--split", "val", "--model", PRETRAINED, "--pretrained", f],
            "text": lambda f: ["text", "digits", "--model", PRETRAINED, "--pretrained", f],
            "timm": lambda f: ["encode", "digits", "--split", "val", "--model", f"timm:test_vit,{f}"],
            "convert": lambda f: ["convert", f, "new.safetensors"],
            "convert base": lambda f: ["convert", f, "new", "--base", "tiny"],
            "convert trust": lambda f: ["convert", f, "new", "--base", "tiny", "--trust"],
            "wise": lambda f: ["wise", "tiny", f, "--out", "merged"],
            "merge": lambda f: ["merge", "soup", "tiny", f, "--out", "merged"],
            "moments": lambda f: ["merge", "regmean", "tiny", "tiny", "--out", "merged", "--moments", f, f],
            "fisher": lambda f: ["wise", "tiny", "tiny", "--out", "merged", "--fisher", f, f],
            "finetune": lambda f: ["finetune", "digits", "--out", "run", "--model", PRETRAINED, "--pretrained", f],
            "evaluate": lambda f: ["evaluate", f, "--on", "digits/test"],
            "predict": lambda f: ["predict", f, "x.png"],
            "prior": lambda f: ["fit", "ridge", "digits/test", "-o", "new.safetensors", "--prior", f],
            "head": lambda f: ["finetune", "digits", "--out", "run", "--head", f],
        }
        good = Path("ridge.safetensors").read_bytes()
        for suffix in (".safetensors", ".pt"):
            for what, content in contents(good).items():
                file = self.file(content, suffix)
                for door, words in doors.items():
                    yield Case(f"{door}, {what}{suffix}", words(file))

    def model_folders(self) -> Iterator[Case]:
        """Folders with odd configurations."""
        good = json.loads((TINY / "open_clip_config.json").read_text())
        doors: tuple[Callable[[str], list[str]], ...] = (
            lambda f: ["encode", "digits", "--split", "val", "--model", f"local-dir:{f}", "--quiet"],
            lambda f: ["text", "digits", "--model", f"local-dir:{f}", "--quiet"],
            lambda f: ["wise", "tiny", f, "--out", "merged"],
            lambda f: ["convert", f, "new", "--overwrite"],
        )
        fields = [("model_cfg", key) for key in good["model_cfg"]] + [
            ("preprocess_cfg", k) for k in good["preprocess_cfg"]
        ]
        deep = [("model_cfg", tower, key) for tower in ("vision_cfg", "text_cfg") for key in good["model_cfg"][tower]]
        turn = 0
        for path in [(), ("model_cfg",), ("preprocess_cfg",), *fields, *deep]:
            for value in (*VALUES, 10**6, MISSING):
                turn += 1
                if path[-1:] == ("image_size",) and value is MISSING:
                    continue  # 224 pixels in patches of this model: it runs, in 5 GB
                folder = self._folder(json.dumps(changed(good, path, value)).encode())
                yield Case(f"{'.'.join(path)} = {shown(value)}", doors[turn % len(doors)](folder))
        for what, content in contents(json.dumps(good).encode()).items():
            yield Case(what, doors[0](self._folder(content)))
            folder = self._folder(json.dumps(good).encode())
            (Path(folder) / "open_clip_model.safetensors").unlink()
            (Path(folder) / "open_clip_model.safetensors").write_bytes(content)
            yield Case(f"weights {what}", doors[0](folder))

    def _folder(self, config: bytes) -> str:
        self.number += 1
        folder = self.folder / f"model{self.number}"
        folder.mkdir()
        for file in TINY.iterdir():
            if file.is_file() and file.suffix in (".safetensors", ".gz"):
                (folder / file.name).symlink_to(file)
        (folder / "open_clip_config.json").write_bytes(config)
        return str(folder)

    def heads(self) -> Iterator[Case]:
        """Head files with odd JSON and odd tensors."""
        doors: tuple[Callable[[str], list[str]], ...] = (
            lambda f: ["evaluate", f, "--on", "digits/test", "--results", "rows.jsonl"],
            lambda f: ["predict", f, "x.png", "--model", "tiny"],
            lambda f: ["compare", f, "ridge.safetensors", "digits/test"],
        )
        turn = 0
        for name in ("ridge", "knn", "tip_adapter", "multilabel", "transductive"):
            tensors = load_file(f"{name}.safetensors")
            with safe_open(f"{name}.safetensors", framework="np") as file:
                facts = {key: text for key, text in file.metadata().items() if key != "digest"}  # as older files
            record = json.loads(facts["head"])

            def written(record: Any, tensors: dict[str, Any], facts: dict[str, str] = facts) -> str:
                path = self.file(b"", ".safetensors")
                save_file(tensors, path, metadata={**facts, "head": json.dumps(record)})
                return path

            inner = [("provenance", key) for key in record["provenance"]]
            for path in [(), *((key,) for key in record), *inner]:
                for value in (*VALUES, MISSING):
                    turn += 1
                    file = written(changed(record, path, value), tensors)
                    yield Case(f"{name} {'.'.join(path)} = {shown(value)}", doors[turn % len(doors)](file))
            for key, array in tensors.items():
                for what, other in odd_arrays(array).items():
                    turn += 1
                    others = {k: v for k, v in tensors.items() if k != key} | ({} if other is None else {key: other})
                    yield Case(f"{name} {key} {what}", doors[turn % len(doors)](written(record, others)))

    def settings(self) -> Iterator[Case]:
        """Parameters of every head, in ``--set`` and in a grid."""
        from heads.estimators.catalogue import HEADS, head_class, parameters_of

        texts = (
            "",
            "x",
            '"x"',
            "[]",
            "{}",
            "null",
            "NaN",
            "-1",
            "0",
            "1e400",
            "[0]",
            '["a"]',
            "[[1]]",
            "true",
            "9" * 30,
            "1e300",
            "[1e-320]",
            "[1e300]",
            "[1, null]",
        )
        for head in HEADS:
            kind = head_class(head)
            stores = ["texts/digits"] if kind.takes_texts or kind.fits_on == "texts" else []
            if kind.fits_on != "texts":
                stores = ["tagged/all" if head.startswith("multilabel") else "digits/test", *stores]
            for name in parameters_of(head):
                for text in texts:
                    words = ["fit", head, *stores, "-o", "new.safetensors", "--set", f"{name}={text}"]
                    yield Case(f"{head}.{name}={text}", words)
            yield Case(f"{head} deep", ["fit", head, "digits/test", "-o", "n", "--set", f"alphas={'[' * 5000}"])
        for text in ("ridge.alphas=x", "ridge.alphas=1", "ridge=", ".=", "=", "ridge.C=[1]", "ridge.alphas=[[{}]]"):
            words = ["sweep", "ridge", "--train", "digits/test", "--on", "digits/test", "--results", "rows.jsonl"]
            yield Case(f"grid {text}", [*words, "--grid", text])

    def recipes(self) -> Iterator[Case]:
        """Recipes with words, lists, tables and dates instead of numbers."""
        from ft.training.options import FinetuneOptions

        odd = (
            '"x"',
            "[]",
            "[[1]]",
            "{}",
            "{a = 1}",
            "1979-05-27",
            "nan",
            "inf",
            "-1",
            "true",
            "1" + "0" * 18,
            "1.5",
            "[1]",
        )
        for field in dataclasses.fields(FinetuneOptions):
            for text in odd:
                if (field.name, text) == ("compile", "true"):
                    continue  # half a minute of compilation, which is what was asked for
                start = "" if field.name in ("steps", "epochs") else "steps = 1\n"
                file = self.file(f"{start}{field.name} = {text}\n".encode(), ".toml")
                out = ["--out", f"run{self.number}", "--recipe", file, "--quiet", "--split", "val"]
                yield Case(f"{field.name} = {text}", ["finetune", "digits", *out])
        for what, content in contents(b"steps = 3\nlr = 1.0\n").items():
            recipe = ["--recipe", self.file(content, ".toml")]
            yield Case(what, ["finetune", "digits", "--out", "run", "--steps", "1", *recipe, "--quiet"])
        for text in (
            "lipsum=x",
            "lipsum=",
            "=",
            "lipsum=1,bank=x",
            "lipsum=1,mode={}",
            "x=1",
            "lipsum=nan",
            "l2sp=[1]",
        ):
            yield Case(text, ["finetune", "digits", "--out", "run", "--steps", "1", "--regularizer", text])

    def plans(self) -> Iterator[Case]:
        """Files of sweeps."""
        good = {
            "models": '["tiny"]',
            "shots": "[1]",
            "seeds": "[0]",
            "alphas": "[0.5]",
            "select_metric": '"top1"',
            "select_shots": "1",
            "paper": '"flyp"',
            "allow_fewer": "true",
        }
        tables = '[[data]]\ntrain = "digits/test"\non = ["digits/test"]\n[[head]]\nname = "ridge"\n'
        odd = (
            '"x"',
            "[]",
            "[[1]]",
            "{}",
            "1979-05-27",
            "nan",
            "-1",
            "true",
            "1e300",
            "[true]",
            "[1.5]",
            "[nan]",
            '[""]',
        )
        for name in good:
            for text in odd:
                file = self.file(f"{name} = {text}\n{tables}".encode(), ".toml")
                yield Case(f"{name} = {text}", ["sweep", "--file", file, "--results", f"{file}.jsonl", "--quiet"])
        for key in ("train", "select", "on", "texts"):
            for text in odd:
                body = f'[[data]]\non = ["digits/test"]\n{key} = {text}\n[[head]]\nname = "ridge"\n'
                body = body.replace('on = ["digits/test"]\non', "on")
                file = self.file(body.encode(), ".toml")
                yield Case(f"data.{key} = {text}", ["sweep", "--file", file, "--results", f"{file}.jsonl"])
        for key in ("name", "set", "grid"):
            for text in (*odd, "{alphas = 1}", '{alphas = "x"}', "{prior = [1]}", "{alphas = [[]]}"):
                body = tables.replace('name = "ridge"', f"{key} = {text}")
                body += 'name = "ridge"\n' if key != "name" else ""
                file = self.file(body.encode(), ".toml")
                yield Case(f"head.{key} = {text}", ["sweep", "--file", file, "--results", f"{file}.jsonl"])
        for what, content in contents(tables.encode()).items():
            yield Case(what, ["sweep", "--file", self.file(content, ".toml")])
            row = ["--train", "digits/test", "--on", "digits/test", "--results", self.file(content, ".jsonl")]
            yield Case(f"results {what}", ["sweep", "ridge", *row, "--set", "ridge.alphas=[1.0]", "--quiet"])
            yield Case(f"report {what}", ["report", self.file(content, ".jsonl")])

    GOOD: Mapping[str, list[str]] = {
        "encode": ["digits", "--split", "val", "--quiet"],
        "text": ["digits", "--quiet"],
        "list": [],
        "info": ["digits/test"],
        "verify": ["digits/test"],
        "rm": ["digits/none"],
        "rename": ["digits/test", "renamed"],
        "relabel": ["digits/test", "none"],
        "gc": [],
        "export": ["digits/test", "out2.csv"],
        "import": ["out.csv", "--encoder-name", "m", "--name", "n"],
        "pack": ["digits/test", "packed2.tar"],
        "unpack": ["packed.tar"],
        "doctor": [],
        "completion": ["bash"],
        "fit": ["ridge", "digits/test", "-o", "new.safetensors", "--set", "alphas=[1.0]"],
        "evaluate": ["ridge.safetensors", "--on", "digits/test", "--results", "rows.jsonl"],
        "compare": ["ridge.safetensors", "knn.safetensors", "digits/test", "--draws", "5"],
        "predict": ["ridge.safetensors", "x.png"],
        "retrieve": ["digits/test", "texts/digits", "--results", "rows.jsonl"],
        "sweep": ["ridge", "--train", "digits/test", "--on", "digits/test", "--results", "sweep.jsonl", "--quiet"],
        "leaks": ["digits/test", "digits/test"],
        "generate": ["--help"],
        "demo": ["--help"],
        "finetune": ["digits", "--split", "val", "--out", "run", "--steps", "1", "--batch-size", "4", "--quiet"],
        "wise": ["tiny", "tiny", "--out", "merged", "--overwrite"],
        "fisher": ["digits:val", "-o", "fisher.safetensors", "--limit", "2", "--quiet"],
        "merge": ["soup", "tiny", "tiny", "--out", "merged", "--overwrite"],
        "moments": ["digits:val", "-o", "moments.safetensors", "--limit", "2", "--quiet"],
        "table": ["zero_shot", "--data", "digits", "--models", "tiny", "--split", "val", "--quiet"],
        "report": ["rows.jsonl"],
        "convert": ["ridge.safetensors", "new.safetensors", "--overwrite"],
    }
    SLOW: Mapping[str, tuple[str, ...]] = {"demo": (), "generate": ()}

    def flags(self) -> Iterator[Case]:
        """Every flag of every verb, with unexpected values."""
        for verb, (module, _) in VERBS.items():
            parser = ArgumentParser()
            import_module(module).add_arguments(parser)
            good = self.GOOD.get(verb, [])
            if "--help" in good:
                continue
            for action in parser._actions:
                if action.nargs == 0 or action.dest in ("help", "trust"):
                    continue
                for number, word in enumerate(WORDS):
                    if action.option_strings:
                        words = [verb, *good, action.option_strings[-1], word]
                    elif number < len(WORDS) and good:
                        words = [verb, word, *good[1:]]
                    else:
                        continue
                    yield Case(f"{verb} {action.dest} {shown(word)[:30]}", words)
        for device in (
            "quantum",
            "cuda",
            "cuda:99",
            "cuda:x",
            "cuda:-1",
            "mps",
            "meta",
            "",
            "cpu:7",
            "xla",
            "privateuseone",
        ):
            yield Case(f"device {device}", ["encode", "digits", "--split", "val", "--device", device])
            yield Case(f"fit device {device}", ["fit", "ridge", "digits/test", "-o", "n", "--device", device])
            yield Case(f"ft device {device}", ["finetune", "digits", "--out", "r", "--steps", "1", "--device", device])
            yield Case(
                f"evaluate device {device}",
                ["evaluate", "ridge.safetensors", "--on", "digits/test", "--device", device],
            )

    def environment(self) -> Iterator[Case]:
        """Environment variables."""
        encode, evaluate = ["encode", "digits", "--split", "val", "--quiet"], ["evaluate", "ridge.safetensors", "--on"]
        evaluate = [*evaluate, "digits/test", "--results", "rows.jsonl"]
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            for word in ("", "x", "-1", "1.5", "\udcff", "9" * 30):
                for words in (encode, evaluate):
                    yield Case(f"{words[0]} {name}={shown(word)}", words, {name: word})
        for word in ("", "/dev/null", "x.png", "\udcff", "s3://", "s3://b b/x", "a" * 5000, "/proc/x"):
            for words in (encode, ["list"], ["info", "digits/test"]):
                yield Case(f"{words[0]} root {shown(word)[:20]}", words, {"FEATCACHE_ROOT": word})
        for word in (
            "",
            "x",
            "http://",
            "http://[::1",
            "ftp://127.0.0.1",
            "http://127.0.0.1:99999",
            "\udcff",
            "http://a b",
        ):
            yield Case(f"endpoint {shown(word)}", ["list", "--root", "s3://bucket/x"], {"AWS_ENDPOINT_URL": word})
        for word in ("", "x", "\udcff"):
            yield Case(f"fsync {shown(word)}", encode, {"FEATCACHE_FSYNC": word})

    def addresses(self) -> Iterator[Case]:
        """URLs and references."""
        odd = (
            "s3://b b/x", "s3://", "s3:///x", "s3://b/\0", "s3://b/\udcff", "s3://B@d:1/x", "s3://b/../x", "s3://[x/y",
            "s3://" + "b" * 300, "s3://b?x=1", "http://", "http://[::1", "http://a:99999/x.tar", "http://127.0.0.1:9/x.tar",
            "https://127.0.0.1:9/x y.tar", "http://\0/x.tar", "http://user@127.0.0.1:9/x.tar", "file:///etc/passwd",
        )  # fmt: skip
        for url in odd:
            yield Case(f"root {shown(url)[:30]}", ["list", "--root", url])
            yield Case(
                f"encode root {shown(url)[:30]}", ["encode", "digits", "--split", "val", "--root", url, "--quiet"]
            )
            yield Case(f"info {shown(url)[:30]}", ["info", url])
            yield Case(f"shards {shown(url)[:30]}", ["encode", f"webdataset:{url}"])
            yield Case(f"fit {shown(url)[:30]}", ["fit", "ridge", url, "-o", "new.safetensors"])
        for text in (
            "digits",
            "digits/",
            "/",
            "digits/test@",
            "@",
            "digits/test#",
            "digits/test#x",
            "#",
            "a/b/c@d#e",
            "\0/x",
        ):
            yield Case(f"reference {shown(text)}", ["info", text])
            yield Case(f"fit {shown(text)}", ["fit", "ridge", text, "-o", "new.safetensors"])

    def texts(self) -> Iterator[Case]:
        """Class lists, templates, prompts, projections, captions."""
        doors: dict[str, tuple[str, Callable[[str], list[str]]]] = {
            "classes": (".txt", lambda f: ["text", f, "--quiet"]),
            "templates": (".txt", lambda f: ["text", "digits", "--templates", f, "--quiet"]),
            "json templates": (".json", lambda f: ["text", "digits", "--templates", f, "--quiet"]),
            "prompts": (".json", lambda f: ["text", "digits", "--prompts", f, "--quiet"]),
            "captions": (".json", lambda f: ["retrieve", "digits/test", "--captions", f, "--quiet"]),
            "projection": (".json", lambda f: [*self.evaluated(), "--projection", f]),
            "subset": (".txt", lambda f: [*self.evaluated(), "--class-subset", f]),
            "import classes": (
                ".txt",
                lambda f: ["import", "out.csv", "--encoder-name", "m", "--name", "n", "--classes", f],
            ),
            "import labels": (
                ".txt",
                lambda f: ["import", "out.csv", "--encoder-name", "m", "--name", "n", "--labels", f],
            ),
            "predict list": (".txt", lambda f: ["predict", "ridge.safetensors", f"@{f}"]),
        }
        records = [
            json.dumps(value).encode() for value in (*VALUES, {"zero": "x"}, {"zero": [1]}, {"zero": []}, ["{}", 1])
        ]
        records += [
            b'{"a": 1, "a": 2}',
            b"\xef\xbb\xbf{}",
            b'{"x": ["\\ud800"]}',
            b'["a \\ud800 {}"]',
            b"\0",
            b"\n\n",
            b"a\0b\n",
        ]
        for door, (suffix, words) in doors.items():
            for what, content in contents(b'{"zero": ["a"]}').items():
                yield Case(f"{door} {what}", words(self.file(content, suffix)))
            for content in records:
                yield Case(f"{door} {content[:20]!r}", words(self.file(content, suffix)))
            for place in ("/dev/zero", "/dev/null", ".", "none"):
                yield Case(f"{door} {place}", words(place))

    def evaluated(self) -> list[str]:
        """First words of an evaluation."""
        return ["evaluate", "ridge.safetensors", "--on", "digits/test", "--results", "rows.jsonl"]

    def data(self) -> Iterator[Case]:
        """Files and folders of data sets."""
        table = {
            ".csv": b"path,label\nx.png,a\n",
            ".tsv": b"path\tlabel\nx.png\ta\n",
            ".jsonl": b'{"path": "x.png", "label": "a"}\n',
            ".parquet": b"PAR1",
        }
        for suffix, good in table.items():
            for what, content in contents(good).items():
                yield Case(f"table {what}{suffix}", ["encode", f"table:{self.file(content, suffix)}", "--quiet"])
        lines = (
            b"x.png\0 a\n",
            b"x.png\n",
            b"\xff a\n",
            b"x.png 99999999999\n",
            b"/dev/zero a\n",
            b"../x.png a\n",
            b"x.png -1\n",
        )
        for line in (*lines, b"x.png a\nx.png a\n", b"x.png a b c\n", b"\x1b[2J a\n", b"x" * 5000 + b" a\n"):
            for flags in ((), ("--labels", "int")):
                yield Case(
                    f"list {line[:20]!r} {flags}", ["encode", f"list:{self.file(line, '.txt')}", "--quiet", *flags]
                )
        for what, content in contents(tar({"a.png": b"x", "a.cls": b"0"})).items():
            yield Case(f"tar {what}", ["encode", f"webdataset:{self.file(content, '.tar')}", "--quiet"])
        archives = (
            {"a.png": b"x"},
            {"a.cls": b"0"},
            {"a.png": b"x", "a.cls": b"\xff"},
            {"../a.png": b"x", "../a.cls": b"0"},
            {"a.png": b"x", "a.cls": b"9" * 30},
            {"a.png": b"x", "a.json": b"[[["},
            {"\0.png": b""},
        )
        for members in archives:
            yield Case(
                f"tar {list(members.items())}", ["encode", f"webdataset:{self.file(tar(members), '.tar')}", "--quiet"]
            )
        huge = tarfile.TarInfo("a.png")
        huge.size = 2**40
        yield Case("tar huge member", ["encode", f"webdataset:{self.file(huge.tobuf(), '.tar')}", "--quiet"])
        for what, (images, labels) in arrays().items():
            folder = self.folder / f"arrays{self.number}"
            self.number += 1
            folder.mkdir()
            (folder / "train_images.npy").write_bytes(images)
            (folder / "train_labels.npy").write_bytes(labels)
            yield Case(f"arrays {what}", ["encode", f"arrays:{folder}", "--quiet"])
        for what, content in pictures().items():
            folder = self.folder / f"pictures{self.number}" / "a"
            self.number += 1
            folder.mkdir(parents=True)
            (folder / "x.png").write_bytes(content)
            source = f"imagefolder:{folder.parent}"
            yield Case(f"picture {what}", ["encode", source, "--split", "all", "--quiet", "--workers", "1"])
            yield Case(f"predict {what}", ["predict", "ridge.safetensors", str(folder / "x.png"), "--workers", "1"])
            one = ["--steps", "1", "--batch-size", "1", "--quiet", "--workers", "1"]
            yield Case(f"finetune {what}", ["finetune", source, "--split", "all", "--out", f"run{self.number}", *one])
        for source in (*DATASETS, "x"):
            for word in ("", ":", ":x", ":\0", ":\udcff", ":x,y=z", ":/dev/null", ":.", ":" + "a" * 5000, ":x:y:z"):
                yield Case(f"source {source}{shown(word)[:20]}", ["encode", f"{source}{word}", "--quiet"])

    def foreign(self) -> Iterator[Case]:
        """Imported features."""
        good = {".npz": io.BytesIO(), ".npy": io.BytesIO(), ".pt": io.BytesIO()}
        features, labels = np.ones((4, 3), np.float32), np.arange(4)
        np.savez(good[".npz"], features=features, labels=labels)
        np.save(good[".npy"], features)
        torch.save({"features": torch.ones(4, 3), "labels": torch.arange(4)}, good[".pt"])
        imported = ["--encoder-name", "m", "--name", "n"]
        files = {suffix: file.getvalue() for suffix, file in good.items()}
        files |= {".csv": Path("out.csv").read_bytes(), ".safetensors": Path("ridge.safetensors").read_bytes()}
        for suffix, content in files.items():
            for what, wrong in contents(content).items():
                yield Case(f"{what}{suffix}", ["import", self.file(wrong, suffix), *imported])
        for what, odd in odd_arrays(features).items():
            if odd is not None:
                path = self.file(b"", ".npz")
                np.savez(path, features=odd, labels=labels)
                yield Case(f"features {what}", ["import", path, *imported])
        for what, odd in odd_arrays(labels).items():
            if odd is not None:
                path = self.file(b"", ".npz")
                np.savez(path, features=features, labels=odd)
                yield Case(f"labels {what}", ["import", path, *imported])
        for scale in ("nan", "-1", "0", "1e400", "inf"):
            yield Case(f"scale {scale}", ["import", "out.csv", *imported, "--logit-scale", scale])

    def folders(self) -> Iterator[Case]:
        """Folders of features in formats of other programs, with one file damaged, missing or odd."""
        for kind in FOLDERS:
            good = self.folder / f"good-{kind}"
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                if main(["export", "digits/test", str(good), "--format", kind, "--dtype", "float16"]):
                    continue  # its package is not installed
            for file in sorted(path for path in good.rglob("*") if path.is_file()):
                inside, content = file.relative_to(good), file.read_bytes()
                for what, wrong in {**contents(content), **odd_json(content), "gone": None}.items():
                    yield Case(f"{kind} {inside} {what}", self._imported(good, inside, wrong))
        retrieval = self.folder / "good-clip-retrieval"
        for what, array in odd_arrays(np.load(retrieval / "img_emb" / "img_emb_0.npy")).items():
            if array is not None:
                odd = Path("img_emb") / "img_emb_1.npy"
                yield Case(f"clip-retrieval second {what}", self._imported(retrieval, odd, npy(array)))
        for what, table in odd_columns().items():
            odd = Path("metadata") / "metadata_0.parquet"
            yield Case(f"clip-retrieval metadata {what}", self._imported(retrieval, odd, table))
            yield Case(
                f"parquet {what}", ["import", self.file(table, ".parquet"), "--encoder-name", "m", "--name", "n"]
            )

    def _imported(self, good: Path, inside: Path, content: bytes | None) -> list[str]:
        self.number += 1
        folder = self.folder / f"features{self.number}"
        shutil.copytree(good, folder)
        (folder / inside).unlink(missing_ok=True)
        if content is not None:
            (folder / inside).write_bytes(content)
        return ["import", str(folder), "--encoder-name", "m", "--name", "n", "--split", "test"]

    def packed(self) -> Iterator[Case]:
        """Packed stores that are damaged, point outside, or hold something else."""
        good = Path("packed.tar").read_bytes()
        found = {**contents(good), **odd_archives(good)}
        for number, (what, content) in enumerate(found.items()):
            yield Case(what, ["unpack", self.file(content, ".tar"), "--root", f"unpacked{number}"])

    def tables(self) -> Iterator[Case]:
        """Multi-label tables."""
        texts = ["", "|", "a||b", "a|a", "[", "[1,", "[1e400]", "[-1]", "[[1]]", "[null]", '["a", 1]', "[" * 5000]
        texts += ("9" * 30, "[1099511627776]", "\0", "\x1b[2J", "[0, 70000]", "NaN", '[""]', "[true]", "{}")
        for text in texts:
            cell = text.replace('"', '""')
            csv = self.file(f'path,tags,other\nx.png,"{cell}",a\n'.encode(), ".csv")
            lines = self.file(json.dumps({"path": "x.png", "tags": text, "other": "a"}).encode(), ".jsonl")
            for file, options in ((csv, ""), (lines, ""), (csv, ",unknown=other"), (csv, ",separator=comma")):
                yield Case(f"cell {shown(text)[:20]} {file[-5:]}{options}", labelled(f"{file},labels=tags{options}"))
            two = self.file(f'path,a,b\nx.png,"{cell}",0\n'.encode(), ".csv")
            yield Case(f"column {shown(text)[:20]}", labelled(f"{two},labels=a+b"))
        for value in VALUES:
            lines = self.file(json.dumps({"path": "x.png", "tags": value, "other": 1}).encode(), ".jsonl")
            for options in (
                "labels=tags",
                "labels=tags+other",
                "labels=tags,unknown=other",
                "labels=other,unknown=tags",
            ):
                yield Case(f"value {shown(value)} {options}", labelled(f"{lines},{options}"))
        wrong = [
            "labels=",
            "labels=none",
            "labels=tags,label=tags",
            "labels=tags,separator=",
            "labels=path,unknown=path",
        ]
        wrong += ("labels=tags,separator=||||", "labels=tags,separator=\0", "unknown=tags", "labels=tags+tags")
        wrong += ("labels=tags,unknown=none", "labels=+", "labels=tags,labels=tags", "labels=tags,path=tags")
        for text in wrong:
            yield Case(f"options {shown(text)}", labelled(f"tagged.csv,{text}"))
        for what, table in odd_columns().items():
            yield Case(f"parquet {what}", labelled(f"{self.file(table, '.parquet')},labels=label,path=image_path"))

    def places(self) -> Iterator[Case]:
        """Pipes without writers, endless devices, folders and dangling links instead of files."""
        imported = ["import", "out.csv", "--encoder-name", "m", "--name", "n"]
        doors: dict[str, tuple[str, Callable[[str], list[str]]]] = {
            "unpack": (".tar", lambda f: ["unpack", f]),
            "shard": (".tar", lambda f: ["encode", f"webdataset:{f}"]),
            "list": (".txt", lambda f: ["encode", f"list:{f}"]),
            "classes": (".txt", lambda f: ["text", f]),
            "templates": (".json", lambda f: ["text", "digits", "--templates", f]),
            "prompts": (".jsonl", lambda f: ["text", "digits", "--prompts", f]),
            "plan": (".toml", lambda f: ["sweep", "--file", f, "--results", "rows.jsonl"]),
            "recipe": (".toml", lambda f: ["finetune", "digits", "--out", "run", "--recipe", f, "--steps", "1"]),
            "figures": (".toml", lambda f: ["report", "rows.jsonl", "--against", f]),
            "results": (".jsonl", lambda f: ["report", f]),
            "more results": (".jsonl", lambda f: [*self.evaluated()[:-1], f]),
            "swept results": (
                ".jsonl",
                lambda f: ["sweep", "ridge", "--train", "digits/test", "--on", "digits/test", "--results", f],
            ),
            "head": (".safetensors", lambda f: ["evaluate", f, "--on", "digits/test"]),
            "prior": (".safetensors", lambda f: ["fit", "ridge", "digits/test", "-o", "new.safetensors", "--prior", f]),
            "picture": (".png", lambda f: ["predict", "ridge.safetensors", f]),
            "pictures": (".txt", lambda f: ["predict", "ridge.safetensors", f"@{f}"]),
            "projection": (".json", lambda f: [*self.evaluated(), "--projection", f]),
            "subset": (".txt", lambda f: [*self.evaluated(), "--class-subset", f]),
            "captions": (".json", lambda f: ["retrieve", "digits/test", "--captions", f]),
            "moments": (
                ".safetensors",
                lambda f: ["merge", "regmean", "tiny", "tiny", "--out", "merged", "--moments", f, f],
            ),
            "coop": (".json", lambda f: ["encode", f"coop:{f}"]),
            "coco": (".json", lambda f: ["encode", f"coco:.,annotations={f}"]),
            "pack": (".tar", lambda f: ["pack", "digits/test", f]),
            "export": (".csv", lambda f: ["export", "digits/test", f]),
            "architecture": (".json", lambda f: ["encode", "digits", "--split", "val", "--model", f]),
        }
        for suffix in (".npz", ".npy", ".pt", ".safetensors", ".parquet", ".csv"):
            doors[f"import {suffix}"] = suffix, lambda f: ["import", f, "--encoder-name", "m", "--name", "n"]
        for suffix in (".npz", ".npy", ".pt", ".txt", ".csv"):
            doors[f"labels {suffix}"] = suffix, lambda f: [*imported, "--labels", f]
        for suffix in (".csv", ".tsv", ".jsonl", ".parquet"):
            doors[f"table {suffix}"] = suffix, lambda f: ["encode", f"table:{f}"]
        for suffix in (".safetensors", ".pt", ".msgpack"):
            doors[f"weights {suffix}"] = suffix, lambda f: ["wise", "tiny", f, "--out", "merged"]
            doors[f"convert {suffix}"] = suffix, lambda f: ["convert", f, "new.safetensors", "--overwrite"]
            doors[f"pretrained {suffix}"] = (
                suffix,
                lambda f: ["encode", "digits", "--split", "val", "--model", PRETRAINED, "--pretrained", f],
            )
        for door, (suffix, words) in doors.items():
            for what, make in PLACES.items():
                self.number += 1
                path = self.folder / f"place{self.number}{suffix}"
                make(path)
                yield Case(f"{door} {what}", words(str(path)))
        for what, make in PLACES.items():
            self.number += 1
            for name in ("images", "labels"):
                folder = self.folder / f"place{self.number}-{name}"
                folder.mkdir()
                for other in ("images", "labels"):
                    (make if other == name else Path.touch)(folder / f"train_{other}.npy")
                yield Case(f"arrays {name} {what}", ["encode", f"arrays:{folder}"])
            for kind, inside in ODD_PLACES.items():
                if not (self.folder / f"good-{kind}").is_dir():
                    continue
                command = self._imported(self.folder / f"good-{kind}", Path(inside), None)
                make(Path(command[1]) / inside)
                yield Case(f"{kind} {what}", command)
            for name in ("open_clip_config.json", "open_clip_model.safetensors"):
                folder = Path(self._folder((TINY / "open_clip_config.json").read_bytes()))
                (folder / name).unlink()
                make(folder / name)
                for verb in (
                    ["encode", "digits", "--split", "val", "--model", f"local-dir:{folder}"],
                    ["wise", "tiny", str(folder), "--out", "m"],
                ):
                    yield Case(f"{verb[0]} {name} {what}", verb)


PLACES: Mapping[str, Callable[[Path], None]] = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "no bytes": lambda path: path.symlink_to("/dev/null"),
    "folder": Path.mkdir,
    "dangling": lambda path: path.symlink_to("nowhere"),
    "circle": lambda path: path.symlink_to(path),
}
ODD_PLACES = {
    "npy": "labels.npy",
    "clip-benchmark": "targets_test.pt",
    "tip-adapter": "test_l.pt",
    "clip-retrieval": "img_emb/img_emb_1.npy",
    "huggingface": "state.json",
}
"""A file of each kind of folder."""


def labelled(table: str) -> list[str]:
    """Encoding a table."""
    return ["encode", f"table:{table}", "--split", "all", "--quiet"]


def tagged(folder: Path) -> str:
    """A multi-label table of small pictures."""
    for row in range(8):
        Image.new("L", (8, 8), 30 * row).save(folder / f"t{row}.png")
    tags = ("a", "a|b", "b", "", "a|b|c", "c", "b|c", "a|c")
    lines = [f"t{row}.png,{text}" for row, text in enumerate(tags)]
    (folder / "tagged.csv").write_text("\n".join(["path,tags", *lines]) + "\n")
    return "table:tagged.csv"


def odd_json(content: bytes) -> dict[str, bytes]:
    """A JSON object with each field replaced or removed in turn; nothing for other content."""
    try:
        record = json.loads(content)
    except ValueError:
        return {}
    if not isinstance(record, dict):
        return {}
    return {
        f"{key} = {shown(value)}": json.dumps(changed(record, (key,), value)).encode()
        for key in record
        for value in (*VALUES, MISSING)
    }


def odd_columns() -> dict[str, bytes]:
    """Parquet files of features whose columns are of odd types, lengths and names."""
    import pyarrow as pa
    from pyarrow import parquet

    features, label = pa.array([[1.0, 2.0], [0.5, 1.0]]), pa.array([0, 1])
    odd = {
        "null": pa.nulls(2),
        "some null": pa.array([[1.0, 2.0], None]),
        "null inside": pa.array([[1.0, None], [0.5, 1.0]]),
        "ragged": pa.array([[1.0], [0.5, 1.0]]),
        "empty lists": pa.array([[], []], pa.list_(pa.float32())),
        "texts": pa.array(["a", "\x1b[2J"]),
        "bytes": pa.array([b"\xff", b""]),
        "nested": pa.array([[[1.0]], [[2.0]]]),
        "structs": pa.array([{"a": 1}, {"a": None}]),
        "dates": pa.array([0, 1], pa.timestamp("ns")),
        "booleans": pa.array([True, None]),
        "words": pa.array(["x", "y"]).dictionary_encode(),
        "large": pa.array([2**62, -(2**62)]),
        "huge": pa.array([1e300, float("nan")]),
        "decimals": pa.array([1, 2]).cast(pa.decimal128(38, 2)),
    }
    columns = {
        "features": features,
        "label": label,
        "id": pa.array(["a", "b"]),
        "image_path": pa.array(["x.png", "y.png"]),
    }
    found = {}
    for name in columns:
        for what, values in odd.items():
            found[f"{name} of {what}"] = columns | {name: values}
    found["no row"] = {name: values[:0] for name, values in columns.items()}
    found["no column"] = {}
    tables = {what: pa.table(values) for what, values in found.items()}
    for text in ("null", "[", "{}", '[1, "a"]', '["a"]', '["a", "a"]', "\xff", "[" * 5000, '[["a"], []]'):
        facts = {b"featcache.classnames": text.encode("latin-1")}
        tables[f"classnames {shown(text)[:20]}"] = pa.table(columns).replace_schema_metadata(facts)
    tables["twice"] = pa.Table.from_arrays([features, features, label], names=["features", "features", "label"])
    files = {}
    for what, table in tables.items():
        file = io.BytesIO()
        parquet.write_table(table, file)
        files[what] = file.getvalue()
    return files


def odd_archives(good: bytes) -> dict[str, bytes]:
    """A packed store whose entries have other names, kinds, sizes and contents."""
    with tarfile.open(fileobj=io.BytesIO(good)) as tar:
        entries = [(entry.name, file.read() if (file := tar.extractfile(entry)) else b"") for entry in tar]
    place = "/".join(entries[0][0].split("/")[:3])

    def packed(change: Callable[[tarfile.TarInfo, int], None], contents: Mapping[str, bytes] | None = None) -> bytes:
        blocks = []
        for number, (name, content) in enumerate(entries):
            entry, held = tarfile.TarInfo(name), (contents or {}).get(name, content)
            entry.size = len(held)
            change(entry, number)
            blocks += [entry.tobuf(tarfile.PAX_FORMAT, errors="surrogatepass"), held, bytes(-len(held) % 512)]
        return b"".join([*blocks, bytes(1024)])

    def first(**fields: Any) -> bytes:
        def change(entry: tarfile.TarInfo, number: int) -> None:
            for name, value in fields.items() if number == 0 else ():
                setattr(entry, name, value)

        return packed(change)

    names = [
        "../x",
        "/tmp/featcache-hostile",
        "a",
        f"{place}/../x",
        f"{place}/a\\b",
        f"{place}/\x1b[2J",
        f"{place}/./x",
    ]
    names += (
        place,
        f"images/{'0' * 24}/{'1' * 24}/x",
        "images/x/y/z",
        f"{place}/{'d/' * 500}x",
        f"{place}/{'n' * 300}",
    )
    names += (f"{place}/new", f"{place}/manifest.json/x", f"texts/{place.partition('/')[2]}/x", f"{place}/é\udcff")
    found = {f"name {shown(name)[-30:]}": first(name=name) for name in names}
    kinds = {"symlink": tarfile.SYMTYPE, "link": tarfile.LNKTYPE, "pipe": tarfile.FIFOTYPE, "device": tarfile.CHRTYPE}
    kinds |= {"folder": tarfile.DIRTYPE, "contiguous": tarfile.CONTTYPE, "sparse": tarfile.GNUTYPE_SPARSE}
    kinds |= {"long name": tarfile.GNUTYPE_LONGNAME, "pax": tarfile.XHDTYPE, "unknown": b"Z"}
    for what, kind in kinds.items():
        found[f"a {what}"] = first(type=kind, linkname="/etc/passwd", size=0)
        for size in (1 << 20, 1 << 32, 1 << 60):
            found[f"a {what} of {size}"] = first(type=kind, linkname=".", size=size)
    for told in ("99999999999999999999", "-1", "x", str(1 << 40)):
        found[f"size {told}"] = first(pax_headers={"size": told})
        found[f"sparse {told}"] = first(
            pax_headers={"GNU.sparse.major": "1", "GNU.sparse.size": told, "GNU.sparse.map": f"0,{told}"}
        )
    found["twice"] = packed(lambda entry, number: None)[:-1024] + good
    for name, content in entries:
        short = name.removeprefix(f"{place}/")
        for what, odd in {"empty": b"", "cut": content[: len(content) // 2], "grown": content + b"\0"}.items():
            found[f"{short} {what}"] = packed(lambda entry, number: None, {name: odd})
        if name == f"{place}/manifest.json":
            for what, odd in odd_json(content).items():
                found[f"{short} {what}"] = packed(lambda entry, number: None, {name: odd})
    return found


def changed(record: Any, path: tuple[str, ...], value: Any) -> Any:
    """A copy of a JSON value with one value in it replaced, or left out."""
    if not path:
        return {} if value is MISSING else value
    copy = dict(record)
    if len(path) == 1 and value is MISSING:
        copy.pop(path[0])
    else:
        copy[path[0]] = changed(record[path[0]], path[1:], value)
    return copy


def shown(value: Any) -> str:
    """A value as part of a case's name."""
    return "missing" if value is MISSING else ascii(value)


def odd_arrays(array: np.ndarray) -> dict[str, np.ndarray | None]:
    """Arrays of other types, shapes and values."""
    flat = array.astype(np.float64).ravel()
    odd = {
        "missing": None,
        "empty": array[:0],
        "scalar": array.ravel()[:1].reshape(()),
        "flat": array.ravel()[:-1],
        "three axes": array[None, None],
        "short": array[:-1],
        "bool": array.astype(bool),
        "uint8": array.astype(np.uint8),
        "float64": array.astype(np.float64) + 0.5,
        "nan": np.full_like(flat, np.nan).reshape(array.shape),
        "huge": np.full_like(flat, 1e300).reshape(array.shape),
        "negative": np.full(array.shape, -7, np.int64),
        "2^40": np.full(array.shape, 2**40, np.int64),
    }
    return {name: None if value is None else np.ascontiguousarray(value) for name, value in odd.items()}


def tar(members: Mapping[str, bytes]) -> bytes:
    """A tar archive."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    """A numpy file."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def npy_header(text: str) -> bytes:
    """A numpy file with only a header."""
    padded = text.encode() + b" " * (53 - len(text) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded


def arrays() -> dict[str, tuple[bytes, bytes]]:
    """Images and labels for the numpy source."""
    images, labels = npy(np.zeros((2, 4, 4, 3), np.uint8)), npy(np.arange(2))
    huge = npy_header("{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000, 999, 999, 3), }")
    found = {f"images {what}": (content, labels) for what, content in contents(images).items()}
    found |= {f"labels {what}": (images, content) for what, content in contents(labels).items()}
    found |= {
        "huge": (huge, labels),
        "negative": (npy_header("{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 4), }"), labels),
        "object": (npy(np.array([{}, []], object)), labels),
        "label object": (images, npy(np.array([{}, []], object))),
        "label 2^40": (images, npy(np.array([0, 2**40]))),
        "label -1": (images, npy(np.array([0, -1]))),
        "label nan": (images, npy(np.array([0, np.nan]))),
        "no side": (npy(np.zeros((2, 0, 4, 3), np.uint8)), labels),
        "none": (npy(np.zeros((0, 4, 4, 3), np.uint8)), npy(np.zeros(0, int))),
        "nan": (npy(np.full((2, 4, 4, 3), np.nan, np.float32)), labels),
        "inf": (npy(np.full((2, 4, 4, 3), np.inf, np.float32)), labels),
        "long": (npy(np.zeros((2, 1, 200_000, 3), np.uint8)), labels),
    }
    return found


def pictures() -> dict[str, bytes]:
    """Image files."""
    found = dict(contents(b"\x89PNG\r\n\x1a\n" + bytes(100)))
    sizes = {"1 x 30,000": (1, 30_000), "200,000 x 1": (200_000, 1), "9,000 x 9,000": (9_000, 9_000), "1 x 1": (1, 1)}
    for name, size in sizes.items():
        file = io.BytesIO()
        Image.new("1", size).save(file, "PNG")
        found[name] = file.getvalue()
    bomb = bytearray(found["1 x 1"])
    bomb[16:24] = struct.pack(">II", 2**31 - 1, 2**31 - 1)
    found["bomb"] = bytes(bomb)
    for mode in ("F", "I", "CMYK", "LA", "P", "I;16", "HSV", "LAB"):
        with contextlib.suppress(OSError, ValueError):
            file = io.BytesIO()
            Image.new(mode, (4, 4)).save(file, "TIFF")
            found[f"TIFF {mode}"] = file.getvalue()
    return found


class Late(BaseException):
    """A case exceeded its time."""


def used_time() -> float:
    """CPU seconds of this process and its children."""
    return sum(os.times()[:4])


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Limit the block to `SECONDS` of time and `NBYTES` of additional memory."""

    def late(*_: object) -> None:
        raise Late(f"over {6 * SECONDS} s")

    def used() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

    before, old = signal.signal(signal.SIGALRM, late), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(
        resource.RLIMIT_AS, (used() + 3 * NBYTES, old[1])
    )  # beyond NBYTES it is reported, beyond this it fails
    signal.setitimer(signal.ITIMER_REAL, 6 * SECONDS)  # wall time, on a machine that may be busy
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, old)
        signal.signal(signal.SIGALRM, before)


def peak() -> int:
    """Peak resident memory in bytes since the last call."""
    status = Path("/proc/self/status").read_text()
    high = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return high


def resident() -> int:
    """Resident memory in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def run(case: Case) -> dict[str, Any]:
    """Run a case; ``broken`` names the rule it broke, if any."""
    out, err = (
        io.TextIOWrapper(io.BytesIO(), "utf-8"),
        io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace"),
    )
    old = dict(os.environ)
    os.environ.update(case.environment)
    with contextlib.suppress(OSError):
        peak()
    began, before, broken, code = used_time(), resident(), "", -1
    try:
        with limited(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(case.words)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        broken = "".join(traceback.format_exception(error)[-4:])[-900:]
    seconds = used_time() - began
    os.environ.clear()
    os.environ.update(old)
    err.flush()
    said = err.buffer.getvalue().decode()
    lines = [line for line in said.splitlines() if line.startswith("featcache: ") and ": warning: " not in line]
    try:
        grown = peak() - before
    except OSError:
        grown = 0
    if not broken:
        if code not in (0, 2, 3, 4, 5):
            broken = f"exit code {code}: {said[-300:]}"
        elif "Traceback" in said or "over 10 s" in said:
            broken = said[-600:]
        elif code and len(lines) != 1 and case.words[0] not in ("predict", "verify"):
            broken = f"{len(lines)} lines: {said[-300:]}"
        elif "MemoryError" in said:
            broken = f"memory: {said[-300:]}"
        elif seconds > SECONDS:
            broken = f"{seconds:.1f} s"
        elif grown > NBYTES:
            broken = f"{grown:,} bytes"
    return {
        "name": case.name,
        "code": code,
        "seconds": round(seconds, 2),
        "grown": grown,
        "said": said[-300:],
        "broken": broken,
    }


def run_all(folder: Path, every: int = 1, first: int = 0) -> None:
    """Run every `every`-th case and print the results."""
    corpus = Corpus(folder)
    for number, case in enumerate(corpus.cases()):
        if number % every == first:
            print(json.dumps(run(case)), flush=True)
            corpus.restore(case.words[0])
            for left in ("run", "merged", "new"):
                shutil.rmtree(left, ignore_errors=True)


if __name__ == "__main__":
    run_all(Path(sys.argv[1]), *map(int, sys.argv[2:]))

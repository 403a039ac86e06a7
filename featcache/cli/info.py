"""The verb ``featcache info``: contents and origin of a store or a head."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from featcache import sibling
from featcache.cli.arguments import STORE_HELP, root_argument, show
from featcache.store import ImageStore, find_store, resolve_root
from featcache.store.catalogue import other_names
from featcache.store.columns import METADATA, SAMPLES
from featcache.store.key import Json
from featcache.store.reading.base import Store
from featcache.store.reading.images import parts_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache info``."""
    parser.add_argument("store", metavar="STORE", help=f"{STORE_HELP}; or the file of a head")
    root_argument(parser)


def run(args: argparse.Namespace) -> int:
    """``featcache info STORE``, ``featcache info HEAD``."""
    if args.store.endswith(".safetensors") and Path(args.store).is_file():
        head = sibling("heads").load(args.store)
        show({"head": head.name, "file": args.store, **head.provenance}, _describe_head(head), args.json)
        return 0
    store = find_store(args.store, resolve_root(args.root))
    for name in {SAMPLES, METADATA} & store.manifest.files.keys():
        store.sidecar(name)  # checks the file, though its content is not printed
    record = {
        "store": str(store.path),
        "kind": store.kind,
        "key": store.manifest.key,
        "info": store.info,
        "identity": store.manifest.identity,
        "arrays": {name: spec.to_json() for name, spec in store.manifest.all_arrays.items()},
        "provenance": store.provenance,
        "other_models": list(other_names(store.path)),
    }
    show(record, _describe(store, record), args.json)
    return 0


def _describe_head(head: Any) -> str:
    record, names = head.provenance, head.classnames
    facts = {"classes": f"{len(names)}: {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}"}
    for role in ("fitted_on", "chosen_on"):
        splits = [
            (f"{entry.get('name')}/{entry['split']}" if entry.get("split") else f"texts/{entry.get('name')}")
            + (f" by {entry['grouped_by']}" if "grouped_by" in entry else "")
            for entry in record.get(role) or ()
        ]
        facts[role.replace("_", " ")] = ", ".join(splits) or "no split recorded"
    facts |= record.params | {"featcache": record.featcache}
    return "\n".join([repr(head), *(f"  {name:<12} {value}" for name, value in facts.items())])


def _describe(store: Store, record: Json) -> str:
    lines = [repr(store), f"  key          {record['key']}"]
    if record["other_models"]:
        lines.append(f"  also found   {', '.join(f'@{model}' for model in record['other_models'])}")
    classes = store.classnames
    lines.append(f"  classes      {len(classes)}: {', '.join(classes[:6])}{', ...' if len(classes) > 6 else ''}")
    lines += [
        f"  {name:<12} {np.dtype(spec['dtype'])} {tuple(spec['shape'])}" for name, spec in record["arrays"].items()
    ]
    if isinstance(store, ImageStore):
        lines.append(f"  unreadable   {len(store.bad)}")
        lines += [f"    {bad.sample_id}: {bad.error}" for bad in store.bad[:10]]
        lines.append(f"  taps, views  {', '.join(part.label for part in parts_of(store)) or 'none'}")
        lines.append(f"  label digest {store.labels_digest}")
    lines += [f"  logit scale  {store.logit_scale}", f"  text tower   {store.text_digest}"]
    lines += [f"  {name:<12} {value}" for name, value in record["provenance"].items()]
    return "\n".join(lines)

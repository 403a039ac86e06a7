"""The verb ``featcache retrieve``: recall@k between images and their captions."""

import argparse
from pathlib import Path
from typing import Any

from featcache.cli.arguments import model_arguments, show
from featcache.encoders import load_encoder
from featcache.encoding.texts import embed_prompts
from featcache.errors import HeadError, MismatchError
from featcache.progress import Printed, Silent
from featcache.prompts import load_prompt_file
from featcache.store import ImageStore, TextStore
from heads.cli.arguments import open_images, open_reference
from heads.cli.evaluate import RESULTS
from heads.evaluation.retrieval import KS
from heads.evaluation.retrieval import retrieve as retrieve_captions
from heads.report.results import append_rows


def retrieve_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache retrieve``."""
    parser.add_argument("images", metavar="IMAGES", help="image store: folder, key, or NAME/SPLIT[@MODEL]")
    parser.add_argument(
        "texts",
        metavar="TEXTS",
        nargs="?",
        help="text store whose classes are sample ids and whose prompts are captions",
    )
    parser.add_argument("--captions", metavar="FILE", help="instead: JSON {sample id: [caption, ...]}, to be embedded")
    parser.add_argument("--caption-column", metavar="NAME", help="instead: a metadata column of the images")
    parser.add_argument("--k", type=int, nargs="+", default=list(KS), help="places to look at (default: 1 5 10)")
    parser.add_argument("--results", default=RESULTS, metavar="FILE", help=f"grows by one row (default: {RESULTS})")
    parser.add_argument("--no-verify", action="store_true", help="do not check the stores' checksums first")
    model_arguments(parser)


def retrieve(args: argparse.Namespace) -> int:
    """``featcache retrieve IMAGES TEXTS``, ``featcache retrieve IMAGES --captions FILE --model M``."""
    given = [value for value in (args.texts, args.captions, args.caption_column) if value]
    if len(given) != 1:
        raise HeadError(f"captions: got {len(given)} of TEXTS, --captions, --caption-column; expected one of them")
    images: Any = open_images(args.images, args)
    row = retrieve_captions(images, _texts(images, args), args.k)
    append_rows(args.results, [row])
    lines = [f"{row['images']:,} images, {row['captions']:,} captions"]
    for way in ("image_to_text", "text_to_image"):
        cells = (f"@{k} {100 * row[f'{images.name}:{way}_recall@{k}']:.1f} %" for k in args.k)
        lines.append(f"{way.replace('_', ' ')} recall  " + "  ".join(cells))
    if row["images_without_caption"]:
        lines.append(f"{row['images_without_caption']:,} images have no caption: they are found by mistake only")
    show(row, "\n".join([*lines, f"1 row appended to {args.results}"]), args.json)
    return 0


def _texts(images: ImageStore, args: argparse.Namespace) -> TextStore:
    """The captions' store, made where there is none yet."""
    if args.texts:
        store = open_reference(args.texts, args)
        if not isinstance(store, TextStore):
            raise HeadError(f"{args.texts}: a store of images; expected a store of texts, made by `featcache text`")
        return store
    if args.captions and not Path(args.captions).exists():
        raise HeadError(f"--captions {args.captions}: no such file; expected JSON {{sample id: [caption, ...]}}")
    prompts = load_prompt_file(args.captions) if args.captions else _column(images, args.caption_column)
    encoder = load_encoder(args.model, args.pretrained, device=args.device, precision=args.precision)
    if encoder.text_digest not in images.text_digests:
        raise MismatchError(
            f"{encoder.name} has text tower {encoder.text_digest}, but {images.name!r} was encoded by "
            f"{images.encoder_name}; give its --model and --pretrained"
        )
    progress = Silent() if args.quiet else Printed()
    name = f"{images.name}-captions"
    return embed_prompts(
        list(prompts), None, encoder, prompts=prompts, name=name, root=args.root, progress=progress
    ).store


def _column(images: ImageStore, column: str) -> dict[str, list[str]]:
    """Captions by sample id, one an image; empty cells are images without one."""
    metadata: dict[str, Any] = dict(images.metadata)
    if column not in metadata:
        known = ", ".join(metadata) or "(it has none)"
        raise HeadError(f"{images.name!r} has no metadata column {column!r}; expected one of {known}")
    return {sample: [str(text)] for sample, text in zip(images.ids, metadata[column], strict=True) if str(text)}

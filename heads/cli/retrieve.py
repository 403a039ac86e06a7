"""The command ``featcache retrieve``: recall@k between images and captions."""

import argparse
from pathlib import Path

from featcache.cli.arguments import encoder_of, model_arguments, progress_of, show
from featcache.errors import HeadError, MismatchError
from featcache.prompts import load_prompt_file
from featcache.store import TextStore
from featcache.store.protocol import FeatureTable
from heads.cli.arguments import open_images, open_texts, results_argument, verify_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache retrieve``."""
    add = parser.add_argument
    add("images", metavar="IMAGES", help="image store: folder, key, or NAME/SPLIT[@MODEL]")
    add("texts", metavar="TEXTS", nargs="?", help="text store, with sample ids as classes and captions as prompts")
    add("--captions", metavar="FILE", help="JSON {sample id: [caption, ...]} to embed, instead of TEXTS")
    add("--caption-column", metavar="NAME", help="metadata column that holds the captions, instead of TEXTS")
    add("--k", type=int, nargs="+", default=[1, 5, 10], help="values of k in recall@k (default: 1 5 10)")
    results_argument(parser, per="run")
    verify_argument(parser)
    model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """``featcache retrieve IMAGES TEXTS``, ``featcache retrieve IMAGES --captions FILE --model M``."""
    from heads import append_rows, retrieve

    given = sum(map(bool, (args.texts, args.captions, args.caption_column)))
    if given != 1:
        raise HeadError(f"captions: got {given} of TEXTS, --captions, --caption-column; expected one of them")
    images = open_images(args.images, args)
    row = retrieve(images, open_texts(args.texts, args) if args.texts else _embedded(images, args), args.k)
    append_rows(args.results, [row])
    lines = [f"{row['images']:,} images, {row['captions']:,} captions"]
    for way in ("image_to_text", "text_to_image"):
        cells = (f"@{k} {100 * row[f'{images.name}:{way}_recall@{k}']:.1f} %" for k in args.k)
        lines.append(f"{way.replace('_', ' ')} recall  " + "  ".join(cells))
    if row["images_without_caption"]:
        lines.append(f"{row['images_without_caption']:,} images have no caption: they are found by mistake only")
    show(row, "\n".join([*lines, f"1 row appended to {args.results}"]), args.json)
    return 0


def _embedded(images: FeatureTable, args: argparse.Namespace) -> TextStore:
    """The captions of a file or a column, as a text store."""
    from featcache.encoding.texts import embed_prompts

    if args.captions and not Path(args.captions).exists():
        raise HeadError(f"--captions {args.captions}: no such file; expected JSON {{sample id: [caption, ...]}}")
    prompts = load_prompt_file(args.captions) if args.captions else _column(images, args.caption_column)
    encoder = encoder_of(args)
    if encoder.text_digest not in images.text_digests:
        raise MismatchError(
            f"{encoder.name} has text tower {encoder.text_digest}, but {images.name!r} was encoded by "
            f"{images.encoder_name}; give its --model and --pretrained"
        )
    where = {"name": f"{images.name}-captions", "root": args.root}
    return embed_prompts(list(prompts), None, encoder, prompts=prompts, progress=progress_of(args), **where).store


def _column(images: FeatureTable, column: str) -> dict[str, list[str]]:
    """Captions by sample id, one per image; empty cells are images without one."""
    metadata = images.metadata
    if column not in metadata:
        known = ", ".join(metadata) or "(it has none)"
        raise HeadError(f"{images.name!r} has no metadata column {column!r}; expected one of {known}")
    return {sample: [str(text)] for sample, text in zip(images.ids, metadata[column], strict=True) if str(text)}

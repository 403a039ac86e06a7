"""Prompts x encoder -> text store.

For class c and prompt t let e[c, t] be the text feature, L2-normalised prompt by prompt. Then

``raw`` (C, T, D)  = e
``cls`` (C, D)     = mean of e over t, each row L2-normalised: the zero-shot weights without the logit scale
``ctx`` (T, D)     = mean of e over c, each row L2-normalised: one context vector a template

as in Lipsum-FT (arXiv 2404.00860), transposed so that rows are classes. The logit scale is recorded, not folded in.
A prompt file gives each class its own sentences; then T is the longest list, shorter ones are padded with NaN, and
there is no ``ctx``.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.encoders import Encoder, load_encoder
from featcache.encoders.base import whole_encoder
from featcache.encoding.chunks import Float, normalise
from featcache.errors import (
    EncoderError,
    PromptError,
    StoreCorruptError,
    StoreIncompleteError,
    StoreNotFoundError,
    StoreSchemaError,
)
from featcache.progress import Progress, Silent
from featcache.prompts import fill, load_templates, prompts_of
from featcache.store import StoreWriter, TextStore, content_key, open_text_store, resolve_root
from featcache.store.catalogue import add_name
from featcache.store.layout import ArraySpec
from featcache.store.manifest import begun_chunk_rows
from featcache.store.places import StorePath, read

CHUNK_NBYTES = 4 << 20


@dataclass(frozen=True)
class TextResult:
    """What an `embed_prompts` run did: `hit` means that no text was encoded."""

    store: TextStore
    hit: bool
    encoded_rows: int
    seconds: float


def embed_text(
    classnames: Sequence[str],
    templates: Sequence[str] | str | None = None,
    model: str | Encoder = "tiny",
    pretrained: str | None = None,
    *,
    prompts: Mapping[str, Sequence[str]] | None = None,
    name: str = "prompts",
    root: str | StorePath | None = None,
    device: str | None = None,
    precision: str = "fp32",
    progress: Progress | None = None,
) -> TextStore:
    """Embed class names x templates, or the sentences of a prompt file, or find them in the cache.

    Parameters
    ----------
    classnames : sequence of C str
        Inserted as they are: DomainNet keeps underscores and capitals. Names may repeat (ImageNet's do).
    templates : sequence of T str, or str, optional
        With ``{}`` where the class name goes, or the name of a set (see `featcache.prompts.template_names`) or file;
        default ``a photo of a {}.``.
    model, pretrained, device, precision
        See `featcache.encoders.load_encoder`.
    prompts : mapping of class name -> sentences, optional
        Instead of templates; underscores in names may stand for spaces.
    name : str
        What the store is called in listings.
    root : str or Path, optional
        Folder of all stores, default ``$FEATCACHE_ROOT``, else ``./cache``.

    Raises
    ------
    PromptError
        No classes, a template without a place for the name, a class without sentences, a text that is too long.
    """
    encoder = load_encoder(model, pretrained, device=device, precision=precision) if isinstance(model, str) else model
    return embed_prompts(classnames, templates, encoder, prompts=prompts, name=name, root=root, progress=progress).store


def embed_prompts(
    classnames: Sequence[str],
    templates: Sequence[str] | str | None,
    encoder: Encoder,
    *,
    prompts: Mapping[str, Sequence[str]] | None = None,
    name: str = "prompts",
    root: str | StorePath | None = None,
    progress: Progress | None = None,
) -> TextResult:
    """`embed_text` for a loaded encoder, with an account of what was done."""
    if templates is not None and prompts is not None:
        raise PromptError("templates and a prompt file were both given; expected one of them")
    if not classnames:
        raise PromptError("no class names were given; expected at least one")
    if isinstance(templates, str):
        templates = load_templates(templates)
    templates = None if prompts is not None else tuple(templates or ("a photo of a {}.",))
    sentences = prompts_of(prompts, classnames) if prompts is not None else fill(templates or (), classnames)
    encoder = whole_encoder(encoder, "encoder:")
    if encoder.text_identity is None:
        raise EncoderError(f"{encoder.name} has no text side; name a CLIP-style model")
    job = _TextJob(tuple(classnames), templates, sentences, encoder, name, resolve_root(root))
    return job.run(progress or Silent())


class _TextJob:
    def __init__(
        self,
        classnames: tuple[str, ...],
        templates: tuple[str, ...] | None,
        sentences: Sequence[Sequence[str]],
        encoder: Encoder,
        name: str,
        root: StorePath,
    ) -> None:
        self.classnames, self.templates, self.sentences = classnames, templates, sentences
        self.encoder, self.name = encoder, name
        self.longest = max(len(texts) for texts in sentences)
        self.identity = {
            "encoder": encoder.text_identity,
            "dataset": {"classnames": list(classnames), "sentences": [list(texts) for texts in sentences]},
        }
        self.key = f"{content_key(self.identity['encoder'] or {})}/{content_key(self.identity['dataset'] or {})}"
        self.path = root / TextStore.kind / self.key

    def run(self, progress: Progress) -> TextResult:
        began = time.perf_counter()
        try:
            store = open_text_store(self.path)
            add_name(store, self.encoder.name)
            return TextResult(store, True, 0, time.perf_counter() - began)
        except StoreSchemaError:
            raise
        except (StoreNotFoundError, StoreIncompleteError, StoreCorruptError):
            pass
        writer = self._writer()
        writer.reopen()
        encoded = self._encode(writer, progress)
        if damaged := writer.drop_damaged():
            raise StoreCorruptError(
                f"{self.path}: {len(damaged)} chunk(s) differ from their markers right after they were written; "
                "run the same command again, and check the disk if it persists"
            )
        self._finalise(writer)
        return TextResult(open_text_store(self.path), False, encoded, time.perf_counter() - began)

    def _writer(self) -> StoreWriter:
        n_classes, dim, nan = len(self.classnames), self.encoder.dim, float("nan")
        rows = min(max(1, CHUNK_NBYTES // (4 * self.longest * dim)), n_classes)
        rows = begun_chunk_rows(self.path, rows)
        specs = {
            "raw": ArraySpec("raw", "<f4", (n_classes, self.longest, dim), rows, nan),
            "cls": ArraySpec("cls", "<f4", (n_classes, dim), rows, nan),
            "counts": ArraySpec("counts", "<i8", (n_classes,), rows, -1),
        }
        ctx = ArraySpec("ctx", "<f4", (self.longest, dim), self.longest, nan)
        whole = {"ctx": ctx} if self.templates is not None else {}
        return StoreWriter(self.path, TextStore.kind, self.key, self.identity, specs, whole, {}, verb="text")

    def _encode(self, writer: StoreWriter, progress: Progress) -> int:
        pending = writer.pending()
        total = sum(len(writer.rows_spec.rows_of(chunk)) for chunk in pending)
        progress.start(
            f"texts/{self.name} with {self.encoder.name}", len(self.classnames), len(self.classnames) - total
        )
        for chunk in pending:
            rows = writer.rows_spec.rows_of(chunk)
            writer.write_chunk(chunk, self._embed(rows))
            progress.advance(len(rows))
        progress.finish()
        return total

    def _embed(self, rows: range) -> dict[str, npt.NDArray[Any]]:
        texts = [text for row in rows for text in self.sentences[row]]
        features, _ = normalise(self.encoder.encode_texts(texts))
        if not np.isfinite(features).all():
            raise EncoderError(f"{self.encoder.name} made NaN or infinite text features; use --precision fp32")
        raw = np.full((len(rows), self.longest, self.encoder.dim), np.nan, dtype=np.float32)
        counts = np.array([len(self.sentences[row]) for row in rows], dtype=np.int64)
        raw[np.arange(self.longest) < counts[:, None]] = features
        return {"raw": raw, "cls": class_means(raw), "counts": counts}

    def _finalise(self, writer: StoreWriter) -> None:
        info = {
            "name": self.name,
            "classnames": list(self.classnames),
            "templates": None if self.templates is None else list(self.templates),
            "encoder_name": self.encoder.name,
            "dim": self.encoder.dim,
            "text_digests": [self.encoder.text_digest],
            "logit_scale": self.encoder.logit_scale,
            "logit_bias": self.encoder.logit_bias,
        }
        whole = {}
        if self.templates is not None:
            specs = writer.specs["raw"]
            chunks = [specs.chunk_array(read(specs.chunk_path(self.path, i))) for i in range(specs.n_chunks)]
            whole["ctx"] = context_means(np.concatenate(chunks)[: len(self.classnames)])
        written = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        writer.finalise(whole, info, self.encoder.provenance | {"source": self.encoder.source, "written": written})


def class_means(raw: npt.NDArray[Float]) -> npt.NDArray[Float]:
    """``cls`` (C, D) of ``raw`` (C, T, D): mean over each class's prompts (not NaN), normalised, in raw's precision."""
    mean: npt.NDArray[np.float64] = np.nanmean(raw, axis=1, dtype=np.float64)
    return normalise(mean.astype(raw.dtype))[0]


def context_means(raw: npt.NDArray[Float]) -> npt.NDArray[Float]:
    """``ctx`` (T, D) of ``raw`` (C, T, D): mean over the classes, normalised, in the precision of raw."""
    mean: npt.NDArray[np.float64] = np.mean(raw, axis=0, dtype=np.float64)
    return normalise(mean.astype(raw.dtype))[0]

"""Encoding prompts into a text store.

The arrays of `TextStore` are those of Lipsum-FT (arXiv 2404.00860), transposed so that rows are classes. The logit
scale is recorded, not folded in. With a prompt file, which gives each class its own sentences, T is the length of the
longest list, shorter ones are padded with NaN, and there is no ``ctx``.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias, Unpack

import numpy as np
import numpy.typing as npt

from featcache.encoders import Encoder, LoadingOptions, load_encoder
from featcache.encoders.base import whole_encoder
from featcache.encoding.chunks import Float, encoder_info, normalise, unit_texts
from featcache.encoding.outputs import Work, stored_rows
from featcache.encoding.store_job import Contents, JobResult, Layout, MadeChunk, StoreJob
from featcache.errors import EncoderError, LabelsChangedError, PromptError
from featcache.progress import Progress, as_progress
from featcache.prompts import fill, load_templates, prompts_of
from featcache.store import StoreWriter, TextStore, resolve_root
from featcache.store.catalogue import add_name, note_hit
from featcache.store.layout import ArraySpec, text_arrays
from featcache.store.places import StorePath
from featcache.store.reading.parts import Part
from featcache.store.writer import Values

CHUNK_NBYTES = 4 << 20
TextResult: TypeAlias = JobResult[TextStore]


def embed_text(
    classnames: Sequence[str],
    templates: Sequence[str] | str | None = None,
    model: str | Encoder = "tiny",
    pretrained: str | None = None,
    *,
    prompts: Mapping[str, Sequence[str]] | None = None,
    name: str = "prompts",
    root: str | StorePath | None = None,
    progress: Progress | bool | None = None,
    **loading: Unpack[LoadingOptions],
) -> TextStore:
    """Embed class names in templates, or the sentences of a prompt file, or find them in the cache.

    Parameters
    ----------
    classnames : C names, inserted unchanged (DomainNet's keep underscores and capitals); they may repeat
    templates : T templates with ``{}`` for the class name; or the name of a set (see
        `featcache.prompts.template_names`) or of a file; default: ``a photo of a {}.``
    model, pretrained, **loading
        See `featcache.encoders.load_encoder`.
    prompts : class name -> sentences, instead of templates; underscores in names may stand for spaces
    name : name of the store in listings
    root : folder of all stores, default ``$FEATCACHE_ROOT``, else ``./cache``

    Raises
    ------
    PromptError
        There are no classes, a template has no ``{}``, a class has no sentences, or a text is too long.
    """
    encoder = load_encoder(model, pretrained, **loading) if isinstance(model, str) else model
    shown = as_progress(progress)
    return embed_prompts(classnames, templates, encoder, prompts=prompts, name=name, root=root, progress=shown).store


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
    """`embed_text` for a loaded encoder; the result also reports what was done."""
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
        raise EncoderError(f"{encoder.name} has no text side; use a CLIP-style model")
    result = _TextJob(tuple(classnames), templates, sentences, encoder, name, resolve_root(root), progress).result()
    if result.hit:
        if result.store.classnames != tuple(classnames):
            raise LabelsChangedError(
                f"texts/{result.store.name}: its classes were renamed after these texts were embedded; expected the "
                f"names given ({', '.join(classnames[:3])}, ...); rename them back with `featcache relabel "
                f"texts/{result.store.name} --classes FILE`, or use that store as it is"
            )
        add_name(result.store, encoder.name)
        note_hit(result.store)
    return result


class _TextJob(StoreJob[TextStore]):
    kind, verb = TextStore, "text"

    def __init__(
        self,
        classnames: tuple[str, ...],
        templates: tuple[str, ...] | None,
        sentences: Sequence[Sequence[str]],
        encoder: Encoder,
        name: str,
        root: StorePath,
        progress: Progress | None,
    ) -> None:
        self.classnames, self.templates, self.sentences = classnames, templates, sentences
        self.encoder, self.name = encoder, name
        self.longest = max(len(texts) for texts in sentences)
        identity = {
            "encoder": encoder.text_identity,
            "dataset": {"classnames": list(classnames), "sentences": [list(texts) for texts in sentences]},
        }
        rows = max(1, CHUNK_NBYTES // (4 * self.longest * encoder.dim))
        what = f"texts/{name} with {encoder.name}"
        super().__init__(root, identity, len(classnames), what, progress=progress, chunk_rows=rows)

    def layout(self, chunk_rows: int) -> Layout:
        shape = (self.n_rows, self.longest, self.encoder.dim)
        ctx = ArraySpec("ctx", "<f4", shape[1:], self.longest, float("nan"))
        return Layout(text_arrays(shape, chunk_rows), {} if self.templates is None else {"ctx": ctx})

    def make(self, works: Iterator[Work]) -> Iterator[MadeChunk]:
        for work in works:
            yield MadeChunk(work, {Part(): self._embed(work.rows)})
            self.advance(len(work.rows))

    def _embed(self, rows: range) -> Values:
        features = unit_texts(self.encoder.encode_texts([t for row in rows for t in self.sentences[row]]), self.encoder)
        raw = np.full((len(rows), self.longest, self.encoder.dim), np.nan, dtype=np.float32)
        counts = np.array([len(self.sentences[row]) for row in rows], dtype=np.int64)
        raw[np.arange(self.longest) < counts[:, None]] = features
        return {"raw": raw, "cls": class_means(raw), "counts": counts}

    def contents(self, part: Part, writer: StoreWriter) -> Contents:
        info = {
            "name": self.name,
            "classnames": list(self.classnames),
            "templates": None if self.templates is None else list(self.templates),
            **encoder_info(self.encoder),
        }
        whole = {} if self.templates is None else {"ctx": context_means(stored_rows(writer, "raw"))}
        return Contents(info, self.encoder.provenance | {"source": self.encoder.source}, whole)


def class_means(raw: npt.NDArray[Float]) -> npt.NDArray[Float]:
    """``cls`` (C, D) of ``raw`` (C, T, D): normalised mean over each class's prompts, ignoring NaN."""
    mean: npt.NDArray[np.float64] = np.nanmean(raw, axis=1, dtype=np.float64)
    return normalise(mean.astype(raw.dtype))[0]


def context_means(raw: npt.NDArray[Float]) -> npt.NDArray[Float]:
    """``ctx`` (T, D) of ``raw`` (C, T, D): normalised mean over the classes."""
    mean: npt.NDArray[np.float64] = np.mean(raw, axis=0, dtype=np.float64)
    return normalise(mean.astype(raw.dtype))[0]

"""Drawing the images of a plan, by any number of processes at once, so that a kill loses at most one batch each.

A process takes batches that nobody has claimed (`featcache.store.claims`), its own share first, draws what is missing
of them, and writes each image whole or not at all. The options are recorded in ``OUT/generate-SPLIT.json`` before the
first image; other options for the same tree are refused. ``OUT/classes.txt`` fixes the order of the classes.
"""

import io
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from featcache.encoding.options import Share
from featcache.errors import FeatcacheError, MismatchError
from featcache.progress import Progress, Silent, Waits
from featcache.prompts.text_files import CLASS_FILE
from featcache.store import places
from featcache.store.claims import Claims
from featcache.store.key import Json, pretty_json
from featcache.store.places.local import sweep_partials
from ft.generation.plan import Plan, Request, class_folders

if TYPE_CHECKING:
    from ft.generation.diffusion import Painter

WORK = ".generate"
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class GenerateOptions:
    """How to draw; the defaults are RegFT's.

    Parameters
    ----------
    images : images per class and prompt; the only option that may grow later
    seed : another seed, other images
    guidance_scale : weight of classifier-free guidance
    steps : denoising steps
    height, width : pixels that the model draws
    size : pixels of each side of the file, after bicubic resizing
    batch_size : images per run of the model; not recorded, since it changes no image
    """

    images: int = 64
    seed: int = 1
    guidance_scale: float = 5.0
    steps: int = 50
    height: int = 512
    width: int = 512
    size: int = 224
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name in ("images", "steps", "height", "width", "size", "batch_size"):
            if getattr(self, name) < 1:
                raise FeatcacheError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not 0 <= self.guidance_scale < float("inf"):
            raise FeatcacheError(f"guidance_scale is {self.guidance_scale}, expected a number from 0")

    @property
    def recorded(self) -> Json:
        """What every image depends on."""
        names = ("seed", "guidance_scale", "steps", "height", "width", "size")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class GenerateResult:
    """What a run did: `made` images were drawn here, `there` of `total` are in the folder now."""

    folder: Path
    classes: int
    total: int
    there: int
    made: int
    seconds: float


def generate(
    classes: Sequence[tuple[str, str]],
    templates: Sequence[str],
    painter: "Painter",
    out: str | Path,
    *,
    split: str = "train",
    options: GenerateOptions | None = None,
    share: Share | None = None,
    progress: Progress | None = None,
) -> GenerateResult:
    """Draw images of every class into ``OUT/SPLIT/<class>/<prompt>_<image>.png``.

    Prompts are numbered from 1 and images from 0, so that RegFT's default (one prompt, seed 1) has RegFT's names.

    Parameters
    ----------
    classes : sequence of C (folder, class name)
    templates : sequence of T str
        Each with ``{}`` for the class name.
    painter : the diffusion model, with the `identity` that is recorded
    split : ``train`` or ``val``; each has noise of its own
    share : which batches to draw first; default: from torchrun's RANK and WORLD_SIZE

    Raises
    ------
    PromptError
        Class names that cannot be folders, a template without ``{}``, or a prompt that the model would truncate.
    MismatchError
        The folder holds images of other options or other classes.
    """
    began = time.perf_counter()
    options, share, out = options or GenerateOptions(), share or Share.from_environment(), Path(out).expanduser()
    if not split or split != Path(split).name or split.startswith("."):
        raise FeatcacheError(f"split {split!r}: expected a folder's name, such as train or val")
    plan = Plan(split, class_folders(classes), templates, options.images, options.seed, options.batch_size)
    painter.check(plan.prompts, options.height, options.width)
    _record(out, plan, options, painter)
    run = _Run(plan, painter, out, options, progress or Silent())
    try:
        run.share(share)
    finally:
        run.claims.release_all()
    there = len(plan) - len(plan.missing(out / split))
    if there == len(plan):
        run.claims.sweep()
        sweep_partials(out / split)
    return GenerateResult(out / split, len(plan.classes), len(plan), there, run.made, time.perf_counter() - began)


class _Run:
    """The work of one process."""

    def __init__(self, plan: Plan, painter: "Painter", out: Path, options: GenerateOptions, progress: Progress) -> None:
        self.plan, self.painter, self.options, self.progress = plan, painter, options, progress
        self.folder, self.claims, self.made = out / plan.split, Claims(out / WORK), 0

    def missing(self, batch: int) -> list[Request]:
        """The images of a batch that are not there."""
        return [request for request in self.plan.batch(batch) if not (self.folder / request.path).exists()]

    def share(self, share: Share) -> None:
        """Draw what this process gets hold of; wait for the others, and take over from those that die."""
        missing = self.plan.missing(self.folder)
        todo = share.order(sorted({number // self.plan.batch_size for number in missing}))
        self.progress.start(f"{self.folder}", len(self.plan), len(self.plan) - len(missing))
        while todo:
            held_by_others = [batch for batch in todo if not self._take(batch)]
            if share.only:
                break
            if len(held_by_others) == len(todo):
                if isinstance(self.progress, Waits):
                    self.progress.wait(self.claims.waited_for())
                time.sleep(POLL_SECONDS)
            todo = held_by_others
        self.progress.finish()

    def _take(self, batch: int) -> bool:
        """Draw a batch; False if another process is at it."""
        claim = f"{self.plan.split}-{self.plan.batch_size}-{batch}"
        if not self.missing(batch):
            return True
        if not self.claims.take(claim):
            return False
        try:
            if requests := self.missing(batch):  # looked at again: another may have finished it just before the claim
                self._draw(requests)
        finally:
            self.claims.release(claim)
        return True

    def _draw(self, requests: Sequence[Request]) -> None:
        drawn = self.painter.draw(
            [request.prompt for request in requests],
            [request.seed for request in requests],
            self.options.height,
            self.options.width,
            steps=self.options.steps,
            guidance_scale=self.options.guidance_scale,
            each_step=self.claims.renew,
        )
        for request, picture in zip(requests, drawn, strict=True):
            places.put(self.folder / request.path, self._png(picture))
        self.made += len(requests)
        self.progress.advance(len(requests))

    def _png(self, picture: Any) -> bytes:
        side = (self.options.size, self.options.size)
        content = io.BytesIO()
        picture.convert("RGB").resize(side, Image.Resampling.BICUBIC).save(content, "PNG")
        return content.getvalue()


def _record(out: Path, plan: Plan, options: GenerateOptions, painter: "Painter") -> None:
    """Write down the options and the class list, or compare them with those of an earlier run."""
    lines = [folder if folder == name else f"{folder}\t{name}" for folder, name in plan.classes]
    _create(out / CLASS_FILE, "".join(f"{line}\n" for line in lines).encode(), "another class list")
    record = {**painter.identity, "templates": list(plan.templates), **options.recorded}
    path = out / f"generate-{plan.split}.json"
    written = pretty_json(record)
    if places.create(path, written) or path.read_bytes() == written:
        return
    try:
        held = json.loads(path.read_bytes())
        differ = [name for name in record if held.get(name) != record[name]]
    except (ValueError, AttributeError):
        held, differ = {}, list(record)
    if differ:
        name = differ[0]
        raise MismatchError(
            f"{path}: its images were drawn with {name} {held.get(name)!r}, got {record[name]!r}; "
            "give the same options to add to them, or name another --out"
        )


def _create(path: Path, content: bytes, what: str) -> None:
    if not places.create(path, content) and path.read_bytes() != content:
        raise MismatchError(f"{path}: got {what} than that of the images in this folder; name another --out")

"""Draw the images of a plan in any number of processes; a kill loses at most one batch of each.

A process claims batches (`featcache.store.claims`), its own share first, draws the missing images, and writes each file
atomically. The options are recorded in ``OUT/generate-SPLIT.json`` before the first image; other options for the same
folder are refused. ``OUT/classes.txt`` fixes the order of the classes.
"""

import io
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from featcache.encoding.options import Share
from featcache.errors import FeatcacheError, MismatchError
from featcache.parameters import Count, NotNegative, check_parameters, parameters_of
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
    images : images per class and prompt; may be increased later
    seed : seed of the images
    guidance_scale : weight of classifier-free guidance
    steps : denoising steps
    height : height of the generated images, in pixels
    width : width of the generated images, in pixels
    size : side of the saved images in pixels, after bicubic resizing
    batch_size : images per forward pass; not recorded, since it changes no image
    """

    images: Count = 64
    seed: int = 1
    guidance_scale: NotNegative = 5.0
    steps: Count = 50
    height: Count = 512
    width: Count = 512
    size: Count = 224
    batch_size: Count = 16

    def __post_init__(self) -> None:
        try:
            check_parameters(parameters_of(GenerateOptions), vars(self))
        except ValueError as error:
            raise FeatcacheError(str(error)) from None

    @property
    def recorded(self) -> Json:
        """Options that every image depends on."""
        names = ("seed", "guidance_scale", "steps", "height", "width", "size")
        return {name: vars(self)[name] for name in names}


@dataclass(frozen=True)
class GenerateResult:
    """Result of a run: `made` images were drawn by this process, and `there` of `total` are now in the folder."""

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

    Prompts are numbered from 1 and images from 0, so that file names agree with RegFT's for one prompt and seed 1.
    Raises PromptError if a class name is not a valid folder name, a template has no ``{}``, or the model would truncate
    a prompt; MismatchError if the folder holds images with other options or classes.

    Parameters
    ----------
    classes : C pairs (folder, class name)
    templates : T templates with ``{}`` for the class name
    painter : the diffusion model; its `identity` is recorded
    split : ``train`` or ``val``, which get different noise
    share : batches to draw first; default: from torchrun's RANK and WORLD_SIZE
    """
    began = time.perf_counter()
    options, share, out = options or GenerateOptions(), share or Share.from_environment(), Path(out).expanduser()
    if not split or split != Path(split).name or split.startswith("."):
        raise FeatcacheError(f"split {split!r}: expected a folder name, such as train or val")
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
    """The share of one process."""

    def __init__(self, plan: Plan, painter: "Painter", out: Path, options: GenerateOptions, progress: Progress) -> None:
        self.plan, self.painter, self.options, self.progress = plan, painter, options, progress
        self.folder, self.claims, self.made = out / plan.split, Claims(out / WORK), 0

    def missing(self, batch: int) -> list[Request]:
        """The missing images of a batch."""
        return [request for request in self.plan.batch(batch) if not (self.folder / request.path).exists()]

    def share(self, share: Share) -> None:
        """Draw all batches that this process can claim; wait for others, and take over from those that die."""
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
        """Draw a batch; False if another process has claimed it."""
        claim = f"{self.plan.split}-{self.plan.batch_size}-{batch}"
        if not self.missing(batch):
            return True
        if not self.claims.take(claim):
            return False
        try:
            if requests := self.missing(batch):  # another process may have finished it just before the claim
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
        side = (self.options.size, self.options.size)
        for request, picture in zip(requests, drawn, strict=True):
            content = io.BytesIO()
            picture.convert("RGB").resize(side, Image.Resampling.BICUBIC).save(content, "PNG")
            places.put(self.folder / request.path, content.getvalue())
        self.made += len(requests)
        self.progress.advance(len(requests))


def _record(out: Path, plan: Plan, options: GenerateOptions, painter: "Painter") -> None:
    """Record the options and the class list, or compare them with those of an earlier run."""
    lines = [folder if folder == name else f"{folder}\t{name}" for folder, name in plan.classes]
    content = "".join(f"{line}\n" for line in lines).encode()
    if not places.create(out / CLASS_FILE, content) and (out / CLASS_FILE).read_bytes() != content:
        raise MismatchError(f"{out / CLASS_FILE}: lists other classes than these; give the same, or name another --out")
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

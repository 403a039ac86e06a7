"""The images to generate: folders, prompts, file names and seeds, all known before the first image.

The seed of an image is a digest of the run's seed, the split, the class folder, the prompt and the image's number. An
image therefore does not depend on batch size, order or number of processes; a larger ``images`` adds images without
changing others; and training and validation images differ.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from featcache.errors import PromptError
from featcache.prompts import fill

SEED_BYTES = 7  # torch.Generator takes seeds below 2**63


@dataclass(frozen=True)
class Request:
    """One image: its path in the split's folder, its prompt, and the seed of its noise."""

    path: str
    prompt: str
    seed: int


@dataclass(frozen=True)
class Plan:
    """The images of one split in drawing order: one of each class, then the next of each.

    There are `images` for each of C pairs (folder, class name) and T templates; a batch is drawn and claimed together.
    """

    split: str
    classes: Sequence[tuple[str, str]]
    templates: Sequence[str]
    images: int
    seed: int
    batch_size: int

    def __len__(self) -> int:
        return len(self.classes) * len(self.templates) * self.images

    def __getitem__(self, number: int) -> Request:
        c, t, image = self._place(number)
        folder, name = self.classes[c]
        prompt = fill([self.templates[t]], [name])[0][0]
        what = json.dumps([self.seed, self.split, folder, prompt, image])
        seed = int.from_bytes(hashlib.sha256(what.encode()).digest()[:SEED_BYTES], "big")
        return Request(f"{folder}/{_file_name(t, image)}", prompt, seed)

    def _place(self, number: int) -> tuple[int, int, int]:
        """Class, template and image of a number."""
        rest, c = divmod(number, len(self.classes))
        image, t = divmod(rest, len(self.templates))
        return c, t, image

    @property
    def prompts(self) -> list[str]:
        """The prompts of all classes."""
        return [prompt for of_class in fill(self.templates, [name for _, name in self.classes]) for prompt in of_class]

    def batch(self, number: int) -> list[Request]:
        """The requests of one batch."""
        start = number * self.batch_size
        return [self[i] for i in range(start, min(start + self.batch_size, len(self)))]

    def missing(self, folder: Path) -> list[int]:
        """Numbers of images that are not in the split's folder."""
        held = [_files(folder / name) for name, _ in self.classes]
        places = ((number, *self._place(number)) for number in range(len(self)))
        return [number for number, c, t, image in places if _file_name(t, image) not in held[c]]


def class_folders(names: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Check that folders of classes are valid names and distinct, given C pairs (folder, class name).

    A ``/`` in a folder name becomes ``_``: RegFT's script makes a folder in a folder of ``F-16A/B``, which
    ``ImageFolder`` reads as another class. Raises PromptError if there are no classes, two share a folder, or a name is
    not valid as a folder or a line of ``classes.txt``.

    >>> class_folders([("F-16A/B", "F-16A/B")])
    [('F-16A_B', 'F-16A/B')]
    """
    if not names:
        raise PromptError("no class names; expected at least one")
    folders: dict[str, str] = {}
    for folder, name in ((folder.replace("/", "_"), name) for folder, name in names):
        usable = folder == folder.strip() and not re.search(r"^$|^[.#]|[\x00-\x1f]", folder)
        if not usable or len(os.fsencode(folder)) > 200 or "\n" in name:
            raise PromptError(f"class {name!r} is not a valid folder name; write `folder<TAB>{name}` into a class file")
        if folder in folders:
            raise PromptError(
                f"classes {folders[folder]!r} and {name!r} have one folder, {folder!r}; write `folder<TAB>name` lines "
                "into a class file, with a folder for each"
            )
        folders[folder] = name
    return list(folders.items())


def _file_name(template: int, image: int) -> str:
    return f"{template + 1:04d}_{image:04d}.png"


def _files(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except FileNotFoundError:
        return set()

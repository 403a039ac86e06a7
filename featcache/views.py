"""The images that an encoder is given of one picture: as it prepares them itself, or augmented."""

from typing import Any

from featcache.augment import AUGMENTATIONS, View, make_view
from featcache.encoders import Encoder
from featcache.errors import EncoderError, FeatcacheError
from featcache.store.parts import Part

__all__ = ["check_views", "view_identity", "view_of"]


def check_views(views: int, augmentation: str, encoder: Encoder) -> None:
    """FeatcacheError where these views cannot be made for this encoder."""
    if not views:
        return
    if augmentation not in AUGMENTATIONS:
        raise FeatcacheError(f"--augmentation {augmentation}: expected one of {', '.join(AUGMENTATIONS)}")
    if not hasattr(encoder, "image_size"):
        raise EncoderError(f"{encoder.name} does not say the size of its images (image_size); views need it")


def view_of(part: Part, encoder: Encoder) -> View:
    """What makes the images of a part: (picture, number of the view, sample id) to an image."""
    return make_view(part.augmentation or "none", encoder, part.seed)


def view_identity(part: Part, encoder: Encoder) -> dict[str, Any]:
    """What a view adds to the identity of the data set; nothing where there is no augmentation."""
    if part.augmentation is None:
        return {}
    return {"view": view_of(part, encoder).identity | {"number": part.view}}

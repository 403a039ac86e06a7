"""A cache back end for mteb's `CachedEmbeddingWrapper`: embeddings in safetensors files with checksums.

Each `FeatureCache.save` writes the new embeddings to one file, atomically. Several processes may share a folder, and a
killed run loses only what it had not saved.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from featcache.errors import needs
from featcache.store.places.targets import replacing
from featcache.store.places.tensors import UNSEALED, check_sound, seal

Vector = npt.NDArray[np.floating]
ENDING = ".safetensors"


class FeatureCache:
    """Embeddings by the content of the embedded items; implements mteb's ``CacheBackendProtocol``.

    Parameters
    ----------
    directory : folder of the files; mteb uses one per task and prompt type

    Examples
    --------
    ``CachedEmbeddingWrapper(model, "embeddings", cache_backend=FeatureCache)``
    """

    def __init__(self, directory: str | Path, **kwargs: object) -> None:
        self.directory = Path(directory)
        self._vectors: dict[str, Vector] = {}
        self._new: list[str] = []

    def add(self, item: Sequence[Mapping[str, object]], vectors: npt.ArrayLike) -> None:
        """Add the vectors (n, D) of n items."""
        for one, vector in zip(item, np.asarray(vectors), strict=True):
            key = _key(one)
            if key not in self._vectors:
                self._new.append(key)
            self._vectors[key] = vector

    def get_vector(self, item: Mapping[str, object]) -> Vector | None:
        """The vector (D,) of an item; None if it is not cached."""
        return self._vectors.get(_key(item))

    def __contains__(self, item: Mapping[str, object]) -> bool:
        return _key(item) in self._vectors

    def save(self) -> None:
        """Write vectors added since the last call to a new file."""
        from safetensors.numpy import save_file

        if not self._new:
            return
        keys = np.array([list(bytes.fromhex(key)) for key in self._new], np.uint8)
        arrays = {"keys": keys, "vectors": np.stack([self._vectors[key] for key in self._new])}
        self.directory.mkdir(parents=True, exist_ok=True)
        with replacing(self.directory / f"{hashlib.sha256(keys.data).hexdigest()[:24]}{ENDING}") as file:
            save_file(arrays, file.name, metadata=dict(UNSEALED))
            seal(file.name)
        self._new.clear()

    def load(self) -> None:
        """Read all saved vectors, including those of other processes; ValueError if a file has another checksum."""
        from safetensors.numpy import load_file

        for file in sorted(self.directory.glob(f"*{ENDING}")):
            check_sound(file)
            held = load_file(file)
            for key, vector in zip(held["keys"], held["vectors"], strict=True):
                self._vectors.setdefault(key.tobytes().hex(), vector)

    def close(self) -> None:
        """Save, and clear the cache in memory."""
        self.save()
        self._vectors.clear()


def _key(item: Mapping[str, object]) -> str:
    """sha256 in hexadecimal of mteb's own hash of an item's content."""
    with needs("the cache of mteb needs mteb 2.26 or later: pip install 'mteb>=2.26'"):
        from mteb._content_hashes import hash_item
    return hashlib.sha256(hash_item(dict(item)).encode()).hexdigest()

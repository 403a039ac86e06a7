"""Stored banks of random texts, as Lipsum takes them: rows to draw from, or their second moment alone."""

import torch

from featcache.encoders import Encoder
from featcache.errors import MismatchError
from featcache.random_texts import SecondMoment
from featcache.store import BankStore, check_deep, find_path, open_bank_store, resolve_root
from featcache.store.places import StorePath
from featcache.text_bank import embed_random_texts

__all__ = ["load_bank", "load_moment", "open_bank"]


def open_bank(reference: str | int, encoder: Encoder, root: str | StorePath | None = None) -> BankStore:
    """The bank that a reference means.

    Parameters
    ----------
    reference : str or int
        A number of texts (the bank is made where there is none yet, with seed 0), a store's folder, its key, or
        ``banks/NAME``.
    encoder : Encoder
        Whose text tower the bank must come from.
    root : str or Path, optional
        Folder of all stores.

    Raises
    ------
    MismatchError
        A bank of another text tower, or a store that is no bank.
    StoreNotFoundError, StoreCorruptError
        No such store, or a damaged one.
    """
    if isinstance(reference, int) or reference.isdigit():
        path: StorePath = embed_random_texts(int(reference), encoder, root=root).store.path
    else:
        path = find_path(reference, resolve_root(root))
    check_deep(path)
    store = open_bank_store(path)
    if encoder.text_digest not in store.text_digests:
        raise MismatchError(
            f"{reference}: random texts of {store.encoder_name}, with another text tower than {encoder.name}; make a "
            f"bank with `featcache text --random {len(store)} --model ...`"
        )
    return store


def load_bank(reference: str | int, encoder: Encoder, root: str | StorePath | None = None) -> torch.Tensor:
    """Features (K, D) float32 of the texts of a bank, unit rows; see `open_bank`."""
    return torch.from_numpy(open_bank(reference, encoder, root).features)


def load_moment(reference: str | int, encoder: Encoder, root: str | StorePath | None = None) -> SecondMoment:
    """Second-moment matrix (D, D) float64 of a bank, its size and error; see `open_bank`."""
    store = open_bank(reference, encoder, root)
    return SecondMoment(torch.from_numpy(store.moment), len(store), store.error)

"""The header of a store: what its group metadata says from the first moment on, finished or not."""

from typing import Any

from featcache.store.layout import HEADER, SCHEMA
from featcache.store.manifest import check_schema, parse_json
from featcache.store.places import StorePath, read_or_none


def existing_header(store: StorePath) -> dict[str, Any] | None:
    """The header in the group metadata of a store that was begun, None where there is none or it is damaged.

    One of another schema is returned as it is.
    """
    try:
        header = dict(parse_json(read_or_none(store / HEADER) or b"")["attributes"]["featcache"])
        numbers = [header["rows"], header["chunk_rows"]] if header["schema"] == SCHEMA else []
        texts = [header["kind"], header["key"], header["verb"]] if header["schema"] == SCHEMA else []
    except (ValueError, KeyError, TypeError):
        return None
    whole = all(type(number) is int and number > 0 for number in numbers)
    return header if whole and all(isinstance(text, str) for text in texts) else None


def begun_chunk_rows(store: StorePath, default: int) -> int:
    """Rows of a chunk of a store that was begun, `default` where there is none.

    Raises
    ------
    StoreSchemaError
        It was begun by another version of featcache.
    """
    begun = existing_header(store)
    if begun is None:
        return default
    check_schema(begun["schema"], store)
    return int(begun["chunk_rows"])

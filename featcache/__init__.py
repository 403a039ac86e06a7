"""featcache: encode images and texts once, then fit and judge heads from the stored features.

>>> import featcache
>>> featcache.__version__
'0.1.0'

Public names are those of featcache/api.py, imported when they are first asked for.
"""

from typing import TYPE_CHECKING

from featcache.lazy import lazy_package
from featcache.version import __version__ as __version__

if TYPE_CHECKING:
    from featcache.api import *  # noqa: F403

lazy_package(__name__, "featcache.api", functions=frozenset({"embed_text", "encode"}))

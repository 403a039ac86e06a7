"""An mkdocs hook: links out of docs/ become the file's name, since the site contains only the pages."""

import re

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, **kwargs: object) -> str:
    """Called by mkdocs for each page.

    >>> on_page_markdown("see [its card](../featcache/encoders/tiny/CARD.md)")
    'see its card (`featcache/encoders/tiny/CARD.md`)'
    """
    return OUTSIDE.sub(r"\1 (`\2`)", markdown)

"""A hook of mkdocs: links out of docs/ become plain text that names the file, since a site holds the pages alone."""

import re

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, **kwargs: object) -> str:
    """Called by mkdocs for each page.

    >>> on_page_markdown("see [its card](../featcache/encoders/tiny/CARD.md)")
    'see its card (`featcache/encoders/tiny/CARD.md`)'
    """
    return OUTSIDE.sub(r"\1 (`\2`)", markdown)

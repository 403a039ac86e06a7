"""mkdocs hooks: what the site needs beyond Markdown."""

import re

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)(?:#[^)]*)?\)")
CODE = re.compile(r"(<pre\b.*?</pre>)|(?<=<code>)([^<]*)(?=</code>)", re.S)
WORD = re.compile(r"[^\s]*-[^\s]*")
LONGEST = 32  # characters of code that fit in one line of a phone


def on_page_markdown(markdown: str, **kwargs: object) -> str:
    """Links out of docs/ become the file's name, since the site contains only the pages.

    >>> on_page_markdown("see [its card](../featcache/encoders/tiny/CARD.md) in [tools](../tools)")
    'see its card (`featcache/encoders/tiny/CARD.md`) in `tools`'
    """
    return OUTSIDE.sub(lambda link: f"`{link[2]}`" if link[1] == link[2] else f"{link[1]} (`{link[2]}`)", markdown)


def on_page_content(html: str, **kwargs: object) -> str:
    r"""Browsers break lines at hyphens; words of inline code, such as ``--model``, stay on one line.

    A pipe in a table is escaped, for which the site needs no backslash.

    >>> on_page_content("<p><code>fit --set C=1</code></p>")
    '<p><code>fit <span class="unbroken">--set</span> C=1</code></p>'
    >>> on_page_content(r"<td><code>cat\|dog</code></td>")
    '<td><code>cat|dog</code></td>'
    """
    return CODE.sub(lambda found: found[1] or WORD.sub(_unbroken, found[2].replace(r"\|", "|")), html)


def _unbroken(word: re.Match[str]) -> str:
    return f'<span class="unbroken">{word[0]}</span>' if len(word[0]) <= LONGEST else word[0]

"""A griffe extension for the API page: ``name : description`` in docstrings, whose types are in the signatures.

numpydoc has the type after the colon, so griffe would show descriptions as types.
"""

import re

import griffe

SECTION = re.compile(r"(?<=\n)((?:Parameters|Attributes)\n-+\n)(.*?)(?=\n\n\S[^\n]*\n-+\n|\Z)", re.S)
NAMED = re.compile(r"^(\*{0,2}\w[\w, *]*) : (.*)$(\n +\S)?", re.M)


def described(text: str) -> str:
    r"""A docstring with the descriptions of its parameters on lines of their own.

    >>> described("Fit.\n\nParameters\n----------\nX : rows (N, D)\n\nReturns\n-------\nint : theirs")
    'Fit.\n\nParameters\n----------\nX\n    rows (N, D)\n\nReturns\n-------\nint : theirs'
    >>> described("Head.\n\nAttributes\n----------\nT_ : float\n    The temperature.")
    'Head.\n\nAttributes\n----------\nT_\n    float.\n    The temperature.'
    """
    return SECTION.sub(lambda found: found[1] + NAMED.sub(_on_its_own_line, found[2]), text)


def _on_its_own_line(named: re.Match[str]) -> str:
    return f"{named[1]}\n    {named[2]}" + (f".{named[3]}" if named[3] else "")


class DescribedParameters(griffe.Extension):  # type: ignore[misc, unused-ignore]
    """Applies `described` to every docstring."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Called by griffe for each object."""
        if obj.docstring:
            obj.docstring.value = described(obj.docstring.value)

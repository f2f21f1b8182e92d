"""Names that a pickle has, as they are shown to people: whoever wrote it may have put anything into them."""

from __future__ import annotations

import keyword

MOST_LETTERS = 200
_MOST_OF_A_MESSAGE = 4000


def is_plain(name: str) -> bool:
    """Whether a name is the path of an attribute, and nothing else when it is pasted into a program."""
    # Python takes some other letters for those of ASCII.
    if len(name) > MOST_LETTERS or not name.isascii():
        return False
    return all(part.isidentifier() and not keyword.iskeyword(part) for part in name.split("."))


def shown(text: str) -> str:
    """A name or the like as it is; if it is none, or long, in quotes, without control characters and cut."""
    if is_plain(text):
        return text
    return repr(text) if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS]!r}..."


def cut(text: str) -> str:
    """A text as part of a message: short, and without characters that act on a terminal."""
    short = text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS]}..."
    return short if short.isprintable() else ascii(short)[1:-1]


def cleaned(text: str) -> str:
    """A message of others, which may quote a pickle, without control characters and cut."""
    cut = text if len(text) <= _MOST_OF_A_MESSAGE else f"{text[:_MOST_OF_A_MESSAGE]}..."
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in cut)

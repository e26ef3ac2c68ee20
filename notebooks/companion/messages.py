"""How messages say an unknown name, with what there is, and a foreign error, in one line."""

import difflib
from collections.abc import Collection


def require(kind: str, name: str, known: Collection[str]) -> None:
    """Raise a ValueError that lists what exists where ``name`` is not among the ``known``."""
    if name not in known:
        near = difflib.get_close_matches(str(name), known, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"unknown {kind} {name!r}{hint}; there are {', '.join(known) or 'none'}")


def one_line(error: BaseException) -> str:
    """Return what an error says in one line of UTF-8, its kind where it says nothing."""
    said = " ".join(str(error).split()).encode("utf-8", "backslashreplace").decode()
    return said or type(error).__name__

"""Fill entries of the store from one pass over the items that they lack."""

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

from torch.utils.data import Subset
from tqdm.auto import tqdm

from .devices import default_modes
from .store import Entry, gaps


@default_modes()
def write(
    entries: Sequence[Entry],
    items: Sequence,
    label: str,
    rows: Callable[[Sequence], Iterable],
    part: tuple[int, int | None] = (0, None),
) -> None:
    """Fill what entries lack of their rows in ``part`` (start, stop: whole files of the store).

    Item i is row i of each. ``rows(some items)`` yields (start, blocks), a block for each entry, in
    their order; further blocks are dropped.
    """
    # Entries that lack nothing are not locked: others may only be reading them.
    lacking = [entry for entry in entries if entry.missing(*part)]
    if not lacking:
        return
    with ExitStack() as locks:
        # One order for all writers: no two wait for each other.
        for entry in sorted(lacking, key=lambda entry: entry.key):
            locks.enter_context(entry.lock(*part))
        # Asked again under the lock: another process may have been faster.
        absent = gaps(lacking, *part)
        with progress(sum(stop - start for start, stop in absent), label) as bar:
            for first, stop in absent:
                for start, blocks in rows(Subset(items, range(first, stop))):
                    for entry, block in zip(entries, blocks):
                        if entry in lacking:
                            entry.write(first + start, block)
                    bar.update(len(blocks[0]))


def progress(total: int, label: str) -> tqdm:
    """Return a bar with rate and time left for people, gone at its end; quiet in batch logs."""
    watched = sys.stderr.isatty() or "JPY_SESSION_NAME" in os.environ
    quiet = not (watched and total)
    return tqdm(total=total, desc=label, unit="row", mininterval=0.5, leave=False, disable=quiet)

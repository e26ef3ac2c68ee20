"""Fill entries of the store from passes over the items that they lack."""

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from torch.utils.data import Subset
from tqdm.auto import tqdm

from .devices import default_modes
from .store import Entry, gaps


@dataclass(frozen=True)
class Pass:
    """Describe one pass, which fills what entries lack of their rows in ``part``, whole files.

    Item i is row i of each entry. ``rows(some items)`` yields (start, blocks), a block for each
    entry, in their order; further blocks are dropped. ``views``: an item's share of the bar.
    """

    entries: Sequence[Entry]
    items: Sequence
    label: str
    rows: Callable[[Sequence], Iterable]
    part: tuple[int, int | None] = (0, None)
    views: int = 1

    def absent(self) -> list[tuple[int, int]]:
        """Return the row ranges that any of the entries lacks."""
        return gaps(self.entries, *self.part)


@default_modes()
def write(*passes: Pass) -> None:
    """Make the passes, one after another, under one bar."""
    left = [one.views * (stop - start) for one in passes for start, stop in one.absent()]
    with progress(sum(left), "views") as bar:
        for one in passes:
            bar.set_description(one.label, refresh=False)
            _write(one, bar)


def _write(one: Pass, bar: tqdm) -> None:
    # Entries that lack nothing are not locked: others may only be reading them.
    lacking = [entry for entry in one.entries if entry.missing(*one.part)]
    with ExitStack() as locks:
        # One order for all writers: no two wait for each other.
        for entry in sorted(lacking, key=lambda entry: entry.key):
            locks.enter_context(entry.lock(*one.part))
        # Asked again under the lock: another process may have been faster.
        for first, stop in one.absent():
            for start, blocks in one.rows(Subset(one.items, range(first, stop))):
                for entry, block in zip(one.entries, blocks):
                    if entry in lacking:
                        entry.write(first + start, block)
                bar.update(one.views * len(blocks[0]))


def progress(total: int, unit: str) -> tqdm:
    """Return a bar with rate and time left for people, gone at its end; quiet in batch logs."""
    quiet = not total or not (sys.stderr.isatty() or "JPY_SESSION_NAME" in os.environ)
    return tqdm(total=total, unit=f" {unit}", mininterval=0.5, leave=False, disable=quiet)

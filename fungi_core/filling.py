"""Fill entries of the store from one pass over the items that they lack."""

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Subset
from tqdm.auto import tqdm

from .store import SHARD, Entry


@dataclass(frozen=True)
class Target:
    """Say where rows go: item i is row ``rows[i]`` of the entry (-1: it is none of its rows).

    ``source``: which of the gradients of a pass, or None for the embedding.
    """

    entry: Entry
    rows: np.ndarray
    source: int | None = 0

    def wanted(self, start: int, stop: int | None) -> np.ndarray:
        """Say which items this entry lacks among its rows start..stop, (N,) bool."""
        lacks = np.zeros(self.entry.n + 1, bool)  # the last stands for items that are no rows
        for low, high in self.entry.missing(start, stop):
            lacks[low:high] = True
        return lacks[self.rows]

    def write(self, items: slice, block: np.ndarray) -> None:
        """Write the rows of some items, run by run."""
        rows = self.rows[items]
        # Row 0 does not go on from -1, an item that is no row.
        edges = np.flatnonzero((np.diff(rows) != 1) | (rows[:-1] < 0)) + 1
        for run, part in zip(np.split(rows, edges), np.split(block, edges), strict=True):
            if run[0] >= 0:
                self.entry.write(int(run[0]), part)


def gaps(
    targets: Sequence[Target], count: int, part: tuple[int, int | None] = (0, None)
) -> list[tuple[int, int]]:
    """Return the ranges [start, stop) of ``count`` items that hold all that any target lacks.

    They are widened to multiples of the store's files: rows that a target lacks may be scattered
    over the items, as a fold's are, and a resumed run must have the batches of an undisturbed one,
    so the same bytes.
    """
    files = np.zeros(-(-count // SHARD) + 2, bool)
    for target in targets:
        files[1 + np.flatnonzero(target.wanted(*part)) // SHARD] = True
    edges = np.minimum(np.flatnonzero(np.diff(files)) * SHARD, count)
    return edges.reshape(-1, 2).tolist()  # (2 gaps,) -> (gaps, 2)


def write(
    targets: Sequence[Target],
    items: Sequence,
    label: str,
    rows: Callable[[Sequence], Iterable],
    part: tuple[int, int | None] = (0, None),
) -> None:
    """Fill what targets lack of their rows in ``part`` (start, stop: whole files of the store).

    ``rows(some items)`` yields (start, embeddings or None, gradients of every source).
    """
    # Targets that lack nothing are not locked: others may only be reading them.
    targets = [target for target in targets if target.wanted(*part).any()]
    with ExitStack() as locks:
        # One order for all writers: no two wait for each other.
        for target in sorted(targets, key=lambda target: target.entry.key):
            locks.enter_context(target.entry.lock(*part))
        # Asked again under the lock: another process may have been faster.
        absent = gaps(targets, len(items), part)
        with progress(sum(stop - start for start, stop in absent), label) as bar:
            for first, stop in absent:
                for start, embeddings, gradients in rows(Subset(items, range(first, stop))):
                    count = len(gradients[0] if gradients else embeddings)
                    place = slice(first + start, first + start + count)
                    for target in targets:
                        source = target.source
                        target.write(place, embeddings if source is None else gradients[source])
                    bar.update(count)


def progress(total: int, label: str) -> tqdm:
    """Return a bar with rate and time left for people; it is quiet in batch logs."""
    watched = sys.stderr.isatty() or "JPY_SESSION_NAME" in os.environ
    quiet = not (watched and total)
    return tqdm(total=total, desc=label, unit="row", mininterval=0.5, disable=quiet)

"""Fill entries of the store from one pass over the items that they lack."""

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
from torch.utils.data import Subset
from tqdm.auto import tqdm

from .devices import default_modes
from .store import SHARD, Entry


class Target(NamedTuple):
    """Say where rows go: item i is row i of the entry.

    ``source``: which of the gradients of a pass, or None for what is seen without any.
    """

    entry: Entry
    source: int | None = 0


def gaps(
    targets: Sequence[Target], count: int, part: tuple[int, int | None] = (0, None)
) -> list[tuple[int, int]]:
    """Return the ranges [start, stop) of ``count`` rows that hold all that any target lacks.

    They are whole files of the store: a resumed run must have the batches of an undisturbed one, so
    the same bytes.
    """
    files = np.zeros(-(-count // SHARD) + 2, bool)
    for target in targets:
        for start, stop in target.entry.missing(*part):
            files[1 + start // SHARD : 1 - (-stop // SHARD)] = True
    edges = np.minimum(np.flatnonzero(np.diff(files)) * SHARD, count)
    return edges.reshape(-1, 2).tolist()  # (2 gaps,) -> (gaps, 2)


@default_modes()
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
    targets = [target for target in targets if target.entry.missing(*part)]
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
                    for entry, source in targets:
                        block = embeddings if source is None else gradients[source]
                        entry.write(first + start, block)
                    bar.update(count)


def progress(total: int, label: str) -> tqdm:
    """Return a bar with rate and time left for people; it is quiet in batch logs."""
    watched = sys.stderr.isatty() or "JPY_SESSION_NAME" in os.environ
    quiet = not (watched and total)
    return tqdm(total=total, desc=label, unit="row", mininterval=0.5, disable=quiet)

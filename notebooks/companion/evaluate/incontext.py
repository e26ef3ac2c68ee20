"""In-context segmentation: a memory of labelled patches, looked up by the patches of test images.

A memory keeps patches of training images with the class shares of their pixels; a test patch mixes
the labels of its nearest ones, without any training (section 4.3, Table 18). What is random is
drawn apart: crops by the views' seed, head, projection and noise by ``head``, the patches that a
memory keeps by ``draw``.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F

from companion import paths
from companion.evaluate import iou, scenes
from companion.evaluate.scenes import LOSSES, Views, gradients
from fungi_core.backbones import Backbone
from fungi_core.filling import Pass, write
from fungi_core.search import largest, rows_at_once
from fungi_core.store import Entry, open_entry


def transfer(similarity: torch.Tensor, labels: torch.Tensor, temperature: float) -> torch.Tensor:
    """Mix labels by attention: similarities (T, k), neighbours' labels (T, k, C) -> (T, C)."""
    weights = (similarity / temperature).softmax(-1)
    return (weights[:, None] @ labels)[:, 0]


def segment(soft: np.ndarray | torch.Tensor, shape: tuple[int, int]) -> np.ndarray:
    """Return a label map (H, W) uint8 of mixed patch labels (T, C): bilinear, then the largest."""
    side, shares = int(len(soft) ** 0.5), torch.as_tensor(soft).T.float()  # (C, T)
    # A class that no patch has wins nowhere; the first one stays, for pixels without any.
    seen = (shares > 0).any(1)
    seen[0] = True
    classes = seen.nonzero()[:, 0]
    grid = shares[classes].unflatten(1, (side, side))[None]  # contiguous: five times as fast
    large = F.interpolate(grid, size=shape, mode="bilinear")[0]  # (classes, H, W)
    winner = large.max(0).indices  # argmax's, five times as fast
    return classes[winner].to(torch.uint8).numpy(force=True)


@dataclass(frozen=True, eq=False)
class Lookup:
    """Hold a memory and the images that are looked up in it, for one backbone.

    ``each``: patches of a training view that the memory keeps, chosen by ``draw``. ``head`` draws
    head, projection and noise. ``k`` and ``temperature`` are Table 18's for the full data set.
    """

    memory: Views
    support: Views
    queries: Views
    backbone: Backbone
    each: int
    draw: int = 0
    head: int = 0
    k: int = 30
    temperature: float = 0.02

    def soft_labels(
        self, kinds: Sequence[str], images: Sequence[int]
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Yield {kind: (T, C)}, the mixed labels of every patch, for each of the images.

        A joined vector of unit length has the mean of its parts' cosines (eq. 8), so all kinds
        share the tokens' product, and what all patches of an image share is multiplied once.
        """
        device, labels = self.backbone.device, self.memory.labels
        kept = scenes.choose_all(labels, self.each, "memory", self.draw)
        labels = torch.from_numpy(labels.reshape(-1, labels.shape[-1])[kept]).to(device)  # (M, C)
        view = torch.from_numpy(kept // self.memory.patches).to(device)  # (M,)
        sides = {kind: self._sides(kind, kept) for kind in {"embedding", *kinds}}
        keys, queries = sides["embedding"]
        step, k = min(self.queries.patches, rows_at_once(keys)), min(self.k, len(labels))
        blocks = keys.new_empty(2, step, len(keys))  # made once: new ones take twice the time
        for i in images:
            found = {kind: [] for kind in kinds}
            for start in range(0, self.queries.patches, step):
                here = slice(start, start + step)
                tokens, both = blocks[:, : self.queries.patches - start]  # (Q, M)
                torch.mm(queries[i, here], keys.T, out=tokens)
                for kind in kinds:
                    rows, asked = sides[kind]
                    if kind == "embedding":
                        value, index = largest(tokens, k)
                    else:  # the sum of both cosines: halved once it is k columns wide
                        if asked.shape[1] > 1:
                            torch.mm(asked[i, here], rows.T, out=both).add_(tokens)
                        else:  # one vector an image, on either side: (1, V) -> (1, M)
                            torch.add(tokens, (asked[i] @ rows.T)[:, view], out=both)
                        value, index = largest(both, k)
                        value = value / 2
                    found[kind].append(transfer(value, labels[index], self.temperature))
            yield {kind: torch.cat(blocks) for kind, blocks in found.items()}

    def confusions(self, kinds: Sequence[str]) -> tuple[dict[str, np.ndarray], list[str]]:
        """Return {kind: (N, C, C)} pixel counts of every test image, and their keys.

        What the store lacks is computed into it, for all kinds at once. Masks have the views' size.
        """
        n, classes = len(self.queries), len(self.queries.data.classes)
        if self.memory.data.classes != self.queries.data.classes:
            names = f"{self.memory.data.name} and {self.queries.data.name}"
            raise ValueError(f"{names} have different classes")
        entries = self.entries(kinds)
        todo = [kind for kind in kinds if not entries[kind].complete]

        def rows(images: Sequence[int]) -> Iterator[tuple]:
            for at, soft in enumerate(self.soft_labels(todo, images)):
                truth = self.queries[images[at]][1]
                maps = [segment(soft[kind], truth.shape) for kind in todo]
                counts = [iou.confusion(truth, one, classes) for one in maps]
                yield at, [one.reshape(1, -1).astype(np.float32) for one in counts]

        label = f"{self.queries.data.name} {', '.join(todo)}"
        write(Pass([entries[kind] for kind in todo], range(n), label, rows))
        found = {kind: entry.read().reshape(n, classes, classes) for kind, entry in entries.items()}
        return found, [entry.key for entry in entries.values()]

    def entries(self, kinds: Sequence[str]) -> dict[str, Entry]:
        """Return the store's entries of `confusions`."""
        n, width = len(self.queries), len(self.queries.data.classes) ** 2
        root = paths.store_dir()
        return {kind: open_entry(self.describe(kind), n, width, root) for kind in kinds}

    def describe(self, kind: str) -> dict:
        """Return everything that changes the outcomes of one kind: their key in the store."""
        gradient = kind in LOSSES
        loss = [asdict(LOSSES[kind]), self.support.identity(), scenes.SUPPORT] if gradient else None
        return scenes.network(self.backbone) | {
            "scenes": scenes.SCENES,
            "views": [self.memory.identity(), self.queries.identity()],
            "outcome": [kind, loss, self.head if gradient or "noise" in kind else None],
            "memory": [self.each, self.draw, self.k, self.temperature],
        }

    def _sides(self, kind: str, kept: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return memory rows (M, D), or (V, D) of whole views, and queries (N, T or 1, D)."""
        memory, queries = (
            scenes.vectors(kind, views, self.backbone, self.head, self.support)
            for views in (self.memory, self.queries)
        )
        rows = memory.reshape(-1, memory.shape[-1])
        rows = rows[kept] if len(rows) > len(memory) else rows
        return tuple(torch.from_numpy(x).to(self.backbone.device) for x in (rows, queries))


def extract(lookups: Sequence[Lookup], kinds: Sequence[str]) -> None:
    """Store the gradients that lookups of one backbone need and lack.

    All heads and losses of the same images come from one pass.
    """
    of_losses = [kind for kind in kinds if kind in LOSSES]
    wanted = defaultdict(dict)  # {(views, support): {(loss, head): None}}, in the lookups' order
    for one in lookups:
        for kind, entry in one.entries(of_losses).items():
            if not entry.complete:
                for views in (one.memory, one.queries):
                    wanted[views, one.support][LOSSES[kind], one.head] = None
    for (views, support), some in wanted.items():
        gradients(views, lookups[0].backbone, list(some), support)

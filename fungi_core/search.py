"""The exact nearest rows of a large memory, in chunks."""

import torch

_GROUP = 16  # columns whose largest similarity alone is sorted in a search's first pass


def nearest(queries: torch.Tensor, keys: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ``k`` keys (M, W) of largest inner product with each query (Q, W).

    Returns similarities (Q, k), descending, and indices. Raises ValueError when the memory has
    fewer than k rows.
    """
    if not 1 <= k <= len(keys):
        raise ValueError(f"{k} neighbours asked for; the memory has {len(keys)} rows")
    step = rows_at_once(keys)
    # One block for all: a new one each time is paged in anew, which halves a CPU's speed.
    block = keys.new_empty(min(step, len(queries)), len(keys))
    found = [largest(torch.mm(q, keys.mT, out=block[: len(q)]), k) for q in queries.split(step)]
    values, indices = zip(*found, strict=True)
    return torch.cat(values), torch.cat(indices)


def rows_at_once(keys: torch.Tensor) -> int:
    """Return how many queries' similarities to ``keys`` take 256 MiB (on a GPU 4 GiB)."""
    return max(1, (2**26 if keys.device.type == "cpu" else 2**30) // len(keys))


def largest(block: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``block.topk(k)`` of (Q, M), several times faster, in two passes.

    The k groups of columns with the largest maxima hold the k largest columns.
    """
    n = block.shape[1] // _GROUP  # groups; column g + n j is member j of group g
    if n < 2 * k:
        return block.topk(k)
    # (Q, _GROUP, n) -> (Q, k)
    best = block[:, : n * _GROUP].unflatten(1, (_GROUP, n)).amax(1).topk(k).indices
    members = n * torch.arange(_GROUP, device=block.device)[:, None]
    columns = (best[:, None] + members).flatten(1)  # (Q, _GROUP * k)
    tail = torch.arange(n * _GROUP, block.shape[1], device=block.device).expand(len(block), -1)
    columns = torch.cat([columns, tail], 1)
    values, at = block.gather(1, columns).topk(k)
    return values, columns.gather(1, at)

"""The exact nearest rows of a large memory, in chunks."""

import torch

_GROUP = 16  # columns whose largest similarity alone is sorted in a search's first pass


def _similarities(
    queries: torch.Tensor, keys: torch.Tensor, parts: tuple[int, int] | None = None
) -> torch.Tensor:
    """Return the inner products (..., Q, M) of (..., Q, W) and (..., M, W).

    ``parts`` = (D, D_out): rows are [token | d | a], each of unit length, and the similarity is the
    mean of the tokens' cosine and the gradients', which is the product of those of their factors:
    the exact kernel of eq. 8, without a projection.
    """
    if parts is None:
        return queries @ keys.mT
    cuts = parts[0], sum(parts)
    (e, d, a), (f, c, b) = (x.tensor_split(cuts, -1) for x in (queries, keys))
    return (d @ c.mT).mul_(a @ b.mT).add_(e @ f.mT).div_(2)


def nearest(
    queries: torch.Tensor, keys: torch.Tensor, k: int, parts: tuple[int, int] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ``k`` most similar rows of each query: similarities (Q, k) descending, indices.

    Memory: 256 MiB of similarities at once on a CPU, 4 GiB on a GPU, whatever the sizes. Raises
    ValueError when the memory has fewer than k rows.
    """
    if not 1 <= k <= len(keys):
        raise ValueError(f"{k} neighbours asked for; the memory has {len(keys)} rows")
    at_once = (2**26 if keys.device.type == "cpu" else 2**30) // len(keys)
    found = [_top(_similarities(q, keys, parts), k) for q in queries.split(max(1, at_once))]
    values, indices = zip(*found, strict=True)
    return torch.cat(values), torch.cat(indices)


def _top(block: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``block.topk(k)`` in two passes over (Q, M).

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

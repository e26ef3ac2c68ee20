"""The nearest rows of a large memory: exact in chunks by default, ScaNN or faiss where they are
installed.
"""

from collections.abc import Callable

import torch

GROUP = 16  # columns whose largest similarity alone is sorted in a search's first pass


def similarities(
    queries: torch.Tensor, keys: torch.Tensor, parts: tuple[int, int] | None = None
) -> torch.Tensor:
    """Inner products (..., Q, M) of (..., Q, W) and (..., M, W).

    ``parts`` = (D, D_out): rows are [token | d | a], each of unit length, and the similarity is the
    mean of the tokens' cosine and the gradients', which is the product of those of their factors:
    the exact kernel of eq. 8, no projection.
    """
    if parts is None:
        return queries @ keys.mT
    cuts = parts[0], sum(parts)
    (e, d, a), (f, c, b) = (x.tensor_split(cuts, -1) for x in (queries, keys))
    return (d @ c.mT).mul_(a @ b.mT).add_(e @ f.mT).div_(2)


def nearest(
    queries: torch.Tensor, keys: torch.Tensor, k: int, parts: tuple[int, int] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``k`` most similar rows of each query, exactly: similarities (Q, k) descending and
    indices (Q, k).

    Memory: 256 MiB of similarities at once on a CPU, 4 GiB on a GPU, whatever the sizes. Raises
    ValueError when the memory has fewer than k rows.
    """
    if not 1 <= k <= len(keys):
        raise ValueError(f"{k} neighbours asked for; the memory has {len(keys)} rows")
    at_once = (2**26 if keys.device.type == "cpu" else 2**30) // len(keys)
    found = [_top(similarities(q, keys, parts), k) for q in queries.split(max(1, at_once))]
    values, indices = zip(*found, strict=True)
    return torch.cat(values), torch.cat(indices)


def _top(block: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``block.topk(k)`` in two passes: the k groups of columns with the largest maxima hold the k
    largest columns.
    """
    n = block.shape[1] // GROUP  # groups; column g + n j is member j of group g
    if n < 2 * k:
        return block.topk(k)
    best = (
        block[:, : n * GROUP].unflatten(1, (GROUP, n)).amax(1).topk(k).indices
    )  # (Q, GROUP, n) -> (Q, k)
    columns = (best[:, None] + n * torch.arange(GROUP, device=block.device)[:, None]).flatten(
        1
    )  # (Q, GROUP * k)
    tail = torch.arange(n * GROUP, block.shape[1], device=block.device).expand(len(block), -1)
    columns = torch.cat([columns, tail], 1)
    values, at = block.gather(1, columns).topk(k)
    return values, columns.gather(1, at)


def scann_index(keys: torch.Tensor, k: int, few: bool = False) -> Callable:
    """ScaNN with the settings of Table 18 (``few``: its few-shot column): queries (Q, W) ->
    (similarities, indices).

    Leaves, leaves to search and reordering are capped by the memory's size. The trees are trained
    on the whole memory.
    """
    try:
        import scann
    except ImportError:
        raise ImportError("needs the package scann: the extra fungi_core[scenes]") from None
    searched, reordered = (256, 1800) if few else (32, 120)
    leaves = min(512, max(1, len(keys) // 40))  # too few rows a leaf leave empty leaves
    builder = scann.scann_ops_pybind.builder(keys.cpu().numpy(), k, "dot_product")
    tree = builder.tree(
        num_leaves=leaves,
        num_leaves_to_search=min(searched, leaves),
        training_sample_size=len(keys),
    )
    hashed = tree.score_ah(4, anisotropic_quantization_threshold=0.2)
    searcher = hashed.reorder(min(reordered, len(keys))).build()

    def search(queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        index, value = searcher.search_batched_parallel(queries.cpu().numpy())
        index = torch.from_numpy(index.astype("int64")).to(queries.device)
        return torch.from_numpy(value.copy()).to(queries.device), index

    return search


def faiss_index(keys: torch.Tensor, k: int, few: bool = False) -> Callable:
    """faiss' inverted file with as many lists and searched lists as ScaNN's leaves of Table 18; as
    `scann_index`.
    """
    try:
        import faiss
    except ImportError:
        raise ImportError("needs the package faiss-cpu: the extra fungi_core[scenes]") from None
    lists = min(512, max(1, len(keys) // 40))
    index = faiss.index_factory(keys.shape[1], f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(keys.cpu().numpy())
    index.add(keys.cpu().numpy())
    index.nprobe = min(256 if few else 32, lists)

    def search(queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        value, at = index.search(queries.cpu().numpy(), k)
        return torch.from_numpy(value).to(queries.device), torch.from_numpy(at).to(queries.device)

    return search


def recall(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Share of the exact neighbours (Q, k) that ``found`` (Q, k) has, order aside."""
    return (exact[:, :, None] == found[:, None]).any(2).float().mean().item()

"""A tiny seeded encoder, inputs and heads for it, shared by the tests of gradients; what lies in a
store.
"""

from pathlib import Path

import timm
import torch

from fungi_core import DINO, KL, SimCLR, load
from fungi_core.rows import draw_parts
from fungi_core.store import Entry, load_record

SMALL = (KL(dim=32), DINO(dim=40), SimCLR(dim=16))


def encoder(pool="token", **changes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("test_vit", num_classes=0, global_pool=pool, **changes)
        for p in model.parameters():  # random biases and norms: no term is zero by initialisation
            p.data += 0.05 * torch.randn_like(p)
    return load(model, layer="blocks.5.attn.proj", device="cpu", dtype="float32")


def views(objective, size, batch=3):
    count = {"kl": 1, "dino": 12, "simclr": 5}[objective.name]
    return torch.randn(batch, count, 3, size, size, generator=torch.Generator().manual_seed(1))


def parts(backbone, objective):
    drawn = draw_parts(backbone, objective, 0)
    drawn.negatives = torch.randn(20, objective.dim, generator=torch.Generator().manual_seed(2))
    return drawn


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def entries(root: Path) -> list[dict]:
    """A dict for each entry of a store: key, meta, n, width, done (rows on disk)."""
    found = [Entry(file.parent, load_record(file)) for file in sorted(root.glob("*/meta.json"))]
    lacking = lambda entry: sum(stop - start for start, stop in entry.missing())
    return [
        {"key": one.key, "meta": one.record["meta"], "n": one.n, "width": one.width}
        | {"done": one.n - lacking(one)}
        for one in found
    ]

"""A tiny seeded encoder, inputs and heads for it, shared by the tests of gradients."""

import timm
import torch

from fungi_core import backbones
from fungi_core import objectives as O
from fungi_core.fungi import Parts, draw_parts

SMALL = (O.KL(dim=32), O.DINO(dim=40), O.SimCLR(dim=16))


def encoder(pool="token", **changes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("test_vit", num_classes=0, global_pool=pool, **changes)
        for p in (
            model.parameters()
        ):  # random biases and norms, so that no term is zero by initialisation
            p.data += 0.05 * torch.randn_like(p)
    return backbones.load(model, layer="blocks.5.attn.proj", device="cpu", dtype="float32")


def views(objective, size, batch=3):
    count = {"kl": 1, "dino": 12, "simclr": 5}[objective.name]
    return torch.randn(batch, count, 3, size, size, generator=torch.Generator().manual_seed(1))


def parts(backbone, objective):
    drawn = draw_parts(backbone, objective, 0)
    negatives = torch.randn(20, objective.dim, generator=torch.Generator().manual_seed(2))
    return Parts(drawn.heads, drawn.projection, negatives)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def shrink_test_vit(patch):
    """``random:test_vit`` at 32 px instead of 160: a twentieth of the time, the same weights each
    time.
    """

    def create(name, spec):
        assert name == "random:test_vit", f"the test asks for {name}"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return timm.create_model("test_vit", num_classes=0, img_size=32)

    patch.setattr(backbones, "_create", create)

"""Against the authors' fungivision 0.0.2: given the same views, heads, negatives and projection,
its gradients.

Its losses are means (KL: over batch and latent units; all: over the batch) and its hook multiplies
by images x views, so its gradients are ours times an exact factor: 1 / latent units for KL, the
number of views for DINO and SimCLR.
"""

import copy

import numpy as np
import pytest
import torch
from helpers import encoder, relative
from PIL import Image

from fungi_core import DINO, KL, SimCLR
from fungi_core.projection import Rademacher
from fungi_core.rows import Parts
from fungi_core.views import ImageInputs, Patches

# The published library is a test dependency; without it there is nothing to compare with, and `make
# test` installs it.
fungivision = pytest.importorskip(
    "fungivision", reason="the extra 'test' (fungivision 0.0.2) is not installed"
)
from fungivision.config import DINOConfig, KLConfig, SimCLRConfig  # noqa: E402
from fungivision.utils import autograd_hacks  # noqa: E402
from fungivision.utils.misc import rgetattr  # noqa: E402
from fungivision.wrapper import FUNGIWrapper  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # its hooks and transforms are deprecated
BATCH, LAYER = 3, "blocks.5.attn.proj"


def published(backbone, config):
    """Its extractor around a copy of our network: hooks leak, weights are unfrozen, heads drawn
    globally.
    """
    model = copy.deepcopy(backbone.model)
    with torch.random.fork_rng(devices=[]):
        wrapper = FUNGIWrapper(
            model,
            LAYER,
            torch.device("cpu"),
            input_dim=backbone.inputs.size,
            extractor_configs=[config],
        )
    return wrapper.extractors[0]


def our_parts(backbone, objective):
    """Heads, projection and negatives from numpy, all different from what either side would draw
    itself.
    """
    heads = objective.heads(backbone, np.random.default_rng(5))
    negatives = torch.randn(40, objective.dim, generator=torch.Generator().manual_seed(6))
    rows, columns = backbone.gradient_shape()
    projection = Rademacher(backbone.width, rows * columns, 9, "given")
    return Parts(backbone.layer, heads, projection, negatives)


def given_views(backbone, batch, count):
    size = backbone.inputs.size
    return torch.randn(batch, count, 3, size, size, generator=torch.Generator().manual_seed(1))


def hand_over(extractor, parts, given):
    extractor.projection_head.weight.data, extractor.projection_head.bias.data = (
        parts.heads["weight"],
        parts.heads["bias"],
    )
    if "teacher_weight" in parts.heads:
        extractor.teacher_projection.weight.data = parts.heads["teacher_weight"]
        extractor.teacher_projection.bias.data = parts.heads["teacher_bias"]
    extractor.comparison_batch = parts.negatives  # what its setup() would have encoded
    extractor.projection = parts.projection.block(
        0, parts.projection.rows
    )  # passing projection= raises
    extractor.projection_scaling = 1.0
    extractor.transform = lambda index: given[index]  # "images" are indices of the given views


def their_gradients(extractor, count):
    """Raw gradients (B, D_out, D_in + 1) and projected ones (B, d), through its own forward()."""
    projected = extractor(list(range(BATCH)))
    layer = rgetattr(extractor.model, LAYER)
    return extractor.extract_gradients(layer, BATCH, count).detach(), projected.detach()


CASES = [
    ("kl at its temperature", KL(temperature=1.0), KLConfig()),
    ("kl at the paper's temperature", KL(), KLConfig(temperature=15)),
    ("dino", DINO(), DINOConfig()),
    ("simclr", SimCLR(denominator="published"), SimCLRConfig()),
]


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize(
    ("objective", "config"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_gradients_are_those_of_the_published_library(objective, config, pool):
    backbone = encoder(pool)
    count = {"kl": 1, "dino": 12, "simclr": 9}[objective.name]
    given = given_views(backbone, BATCH, count)
    parts = our_parts(backbone, objective)
    loss = lambda embeddings: objective.loss(embeddings, parts.heads, parts.negatives)
    _, (factors,) = backbone.factors(given, loss)
    extractor = published(backbone, config)
    hand_over(extractor, parts, given[:, 0] if objective.name == "kl" else given)
    raw, projected = their_gradients(extractor, count)
    factor = 1 / objective.dim if objective.name == "kl" else count
    assert relative(factor * factors.gradient(), raw) < 1e-4
    assert relative(factor * parts.projection.apply(factors), projected) < 1e-4
    for mine, theirs in ((factors.gradient(), raw), (parts.projection.apply(factors), projected)):
        unit = lambda x: torch.nn.functional.normalize(x.flatten(1))
        assert (unit(mine) - unit(theirs)).norm(
            dim=1
        ).max() < 1e-4  # every image by itself, as features use them


def test_the_denominator_of_eq_5_is_another_gradient():
    """So that the agreement above is known to test something: only the published denominator
    agrees.
    """
    backbone = encoder()
    given = given_views(backbone, BATCH, 9)
    grads = {}
    for denominator in ("published", "eq5"):
        objective = SimCLR(denominator=denominator)
        parts = our_parts(backbone, objective)
        loss = lambda e, o=objective, p=parts: o.loss(e, p.heads, p.negatives)
        grads[denominator] = backbone.factors(given, loss)[1][0].gradient()
    assert relative(grads["eq5"], grads["published"]) > 0.01


def test_negatives_are_encoded_alike():
    backbone, objective = encoder(), SimCLR()
    parts, extractor = (
        our_parts(backbone, objective),
        published(backbone, SimCLRConfig(comparison_batch_size=2)),
    )
    given = given_views(backbone, 2, 9)
    hand_over(extractor, parts, given)
    extractor.transform = lambda views: views
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        order = torch.randperm(2)
        torch.manual_seed(0)
        extractor.setup([(views, 0) for views in given])
    ours = torch.cat([objective.latents(backbone.embed(given[i]), parts.heads) for i in order])
    assert relative(ours, extractor.comparison_batch) < 1e-5


def test_patches_are_its_patchify():
    extractor = published(encoder(img_size=224), SimCLRConfig())
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    ).resize((300, 260))
    inputs, kind = ImageInputs(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), Patches()
    square = inputs.stack([kind.draw(image, inputs, np.random.default_rng(0), "cpu")])
    (ours,) = kind.finish(square, inputs, torch.float32)
    theirs = extractor.transform(image)
    assert ours.shape == theirs.shape == (49, 3, 224, 224)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_it_still_cannot_take_a_projection():
    """When this fails, the work-around above can go."""
    backbone = encoder()
    with pytest.raises(UnboundLocalError):
        FUNGIWrapper(
            copy.deepcopy(backbone.model),
            LAYER,
            torch.device("cpu"),
            projection=torch.ones(64, 64 * 65),
            input_dim=backbone.inputs.size,
            extractor_configs=[KLConfig()],
        )
    assert autograd_hacks._hooks_disabled is False

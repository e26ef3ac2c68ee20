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

from fungi_core import objectives as O
from fungi_core import views
from fungi_core.fungi import Parts
from fungi_core.projection import Rademacher

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
            model, LAYER, torch.device("cpu"), input_dim=backbone.size, extractor_configs=[config]
        )
    return wrapper.extractors[0]


def our_parts(backbone, objective):
    """Heads, projection and negatives from numpy, all different from what either side would draw
    itself.
    """
    heads = objective.heads(backbone.width, np.random.default_rng(5))
    negatives = torch.randn(40, objective.dim, generator=torch.Generator().manual_seed(6))
    return Parts(heads, Rademacher(backbone.width, backbone.gradient_size(), 9, "given"), negatives)


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
    ("kl at its temperature", O.KL(temperature=1.0), KLConfig()),
    ("kl at the paper's temperature", O.KL(), KLConfig(temperature=15)),
    ("dino", O.DINO(), DINOConfig()),
    ("simclr", O.SimCLR(denominator="published"), SimCLRConfig()),
]


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize(
    ("objective", "config"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_gradients_are_those_of_the_published_library(objective, config, pool):
    backbone = encoder(pool)
    count = {"kl": 1, "dino": 12, "simclr": 9}[objective.name]
    given = torch.randn(
        BATCH, count, 3, backbone.size, backbone.size, generator=torch.Generator().manual_seed(1)
    )
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
    given = torch.randn(
        BATCH, 9, 3, backbone.size, backbone.size, generator=torch.Generator().manual_seed(1)
    )
    grads = {}
    for denominator in ("published", "eq5"):
        objective = O.SimCLR(denominator=denominator)
        parts = our_parts(backbone, objective)
        loss = lambda e, o=objective, p=parts: o.loss(e, p.heads, p.negatives)
        grads[denominator] = backbone.factors(given, loss)[1][0].gradient()
    assert relative(grads["eq5"], grads["published"]) > 0.01


def test_negatives_are_encoded_alike():
    backbone, objective = encoder(), O.SimCLR()
    parts, extractor = (
        our_parts(backbone, objective),
        published(backbone, SimCLRConfig(comparison_batch_size=2)),
    )
    given = torch.randn(
        2, 9, 3, backbone.size, backbone.size, generator=torch.Generator().manual_seed(1)
    )
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
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    square = torch.from_numpy(views.square(image, 224).copy())[None]
    ours = views.finish(square, O.SimCLR(), mean, std, torch.float32)[0]
    theirs = extractor.transform(image)
    assert ours.shape == theirs.shape == (49, 3, 224, 224)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_it_still_cannot_take_a_projection():
    """When this fails, the work-around above can go."""
    backbone = encoder()
    with pytest.raises(UnboundLocalError):
        FUNGIWrapper(copy.deepcopy(backbone.model), LAYER, torch.device("cpu"), projection=torch.ones(64, 64 * 65),
                     input_dim=backbone.size, extractor_configs=[KLConfig()])  # fmt: skip
    assert autograd_hacks._hooks_disabled is False

"""Features do not depend on what the caller has set in torch: modes, default device and dtype."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from small import LAYERS, SMALL, Pictures, pictures, small

from fungi_core import Fungi, resampling, tokens
from fungi_core.devices import default_modes
from fungi_core.extract import extract
from fungi_core.rows import draw_parts


@contextmanager
def float64():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def meta():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64": float64,
    "meta": meta,
    "meta, as a block": lambda: torch.device("meta"),
}


def state() -> tuple:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.get_default_device(),
    )


def fresh(fast: bool):
    """Return a network of which nothing is cached yet, and empty the cache that all share."""
    resampling.bicubic_matrix.cache_clear()
    backbone = small()
    backbone.fast = fast
    return backbone


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fast", [True, False])
def test_a_transformers_features_are_the_same_inside_and_afterwards(fast, mode):
    images = pictures(5)
    expected = Fungi(fresh(fast), SMALL, pca=4).fit_transform(images)
    loaded = fresh(fast)
    for get in (lambda: loaded, lambda: fresh(fast)):  # loaded outside of the mode, and in it
        with MODES[mode]():
            before = state()
            one = Fungi(get(), SMALL, pca=4)
            found = one.fit_transform(images)
            assert state() == before
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_allclose(one.transform(images), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_stored_is_the_same(mode, tmp_path):
    data = Pictures("train", tuple(range(6)))
    expected = extract(data, fresh(True), SMALL, layer=LAYERS[2], root=tmp_path / "outside")
    with MODES[mode]():
        found = extract(data, fresh(True), SMALL, layer=LAYERS[2], root=tmp_path / "inside")
    assert found.keys == expected.keys
    for name, block in expected.blocks.items():
        np.testing.assert_array_equal(found.blocks[name], block)


@pytest.mark.parametrize("mode", MODES)
def test_patches_are_the_same(mode):
    pixels = [np.asarray(image.resize((32, 32))) for image in pictures(2)]
    support = torch.nn.functional.normalize(torch.arange(640.0).sin().reshape(10, 64), dim=-1)

    def made():
        encoder, loss = small(), tokens.LOSS
        part = draw_parts(encoder, loss, 0)
        wanted = [(loss, part, 0)]
        (gradients,) = tokens.unit_gradients(encoder, pixels, ["0", "1"], support, wanted)
        return tokens.unit_tokens(encoder, pixels), gradients

    expected = made()
    with MODES[mode]():
        found = made()
    for block, same in zip(expected, found, strict=True):
        assert block.dtype == torch.float32
        np.testing.assert_array_equal(same.numpy(), block.numpy())


def test_heads_that_come_from_inference_mode_serve_outside():
    images = pictures(4)
    expected = Fungi(small(), SMALL, pca=None).fit_transform(images)
    with torch.inference_mode():
        heads = {o.name: draw_parts(small(), o, 0).heads for o in SMALL}
        heads = {name: {k: v.clone() for k, v in one.items()} for name, one in heads.items()}
    assert heads["kl"]["weight"].is_inference()
    given = Fungi(small(), SMALL, pca=None, heads=heads).fit(images)
    np.testing.assert_array_equal(given.transform(images), expected)


def test_modes_are_as_they_were_after_an_error():
    with torch.inference_mode(), float64():
        inside = state()
        with pytest.raises(ZeroDivisionError), default_modes():
            raise ZeroDivisionError
        assert state() == inside

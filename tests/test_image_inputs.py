"""The evaluation transform of a backbone against timm's own, in every crop mode."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from fungi_core.views import ImageInputs

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHAPES = [(100, 100), (90, 70), (70, 91), (33, 200), (301, 47), (32, 32), (20, 31), (7, 5), (1, 9)]
MODES = ("center", "squash", "border")


def picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def ours(image, *settings) -> torch.Tensor:
    inputs = ImageInputs(*settings)
    return inputs.finish(inputs.stack([inputs.whole(image)]), torch.float32)[0, 0]


def timms(image, size, mean, std, crop, mode, interpolation) -> torch.Tensor:
    transform = create_transform(
        (3, size, size),
        mean=mean,
        std=std,
        crop_pct=crop,
        crop_mode=mode,
        interpolation=interpolation,
    )
    return transform(image)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest"])
@pytest.mark.parametrize("crop", [1.0, 0.875, 0.5])
@pytest.mark.parametrize("mode", MODES)
def test_every_crop_mode_is_timms(mode, crop, interpolation):
    for shape in SHAPES:
        settings = 32, MEAN, STD, crop, mode, interpolation
        found, expected = (f(picture(*shape), *settings) for f in (ours, timms))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5, msg=f"{shape}")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [31, 48, 224])
def test_other_sizes_and_other_means(mode, size):
    """The border of "border" is the mean colour, so it depends on the mean."""
    for mean in ((0.0, 0.5, 1.0), (0.3, 0.31, 0.309)):
        settings = size, mean, (0.5, 0.5, 0.5), 0.9, mode, "bicubic"
        found, expected = (f(picture(150, 100), *settings) for f in (ours, timms))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(1, 300), (400, 1)])
def test_a_line_of_pixels_is_resized_in_its_middle_alone(shape, interpolation):
    """Such a one would become gigabytes; what is cut out differs by rounding alone."""
    settings = 16, (0.0,) * 3, (1.0,) * 3, 0.9, "center", interpolation
    image = picture(*shape)
    found, expected = (f(image, *settings) for f in (ours, timms))
    torch.testing.assert_close(found, expected, rtol=0, atol=1.5 / 255)


@pytest.mark.parametrize("shape", [(1, 500), (500, 1)])
def test_a_line_of_pixels_keeps_one_pixel_between_its_borders(shape):
    """Where timm's transform fails, because the line would be no pixel wide."""
    image = Image.new("RGB", shape, (255, 255, 255))
    found = ours(image, 32, (0.0,) * 3, (1.0,) * 3, 1.0, "border", "bicubic")
    line = found.sum((0, 1)) if shape[0] == 1 else found.sum((0, 2))  # (32,)
    assert line.tolist() == [0] * 15 + [3 * 32] + [0] * 16


@pytest.mark.parametrize(("mode", "interpolation"), [("round", "bicubic"), ("center", "lanczos")])
def test_what_is_unknown_lists_what_there_is(mode, interpolation):
    known = "there are center, squash, border with bicubic, bilinear, nearest"
    with pytest.raises(ValueError, match=known) as error:
        ImageInputs(32, MEAN, STD, 1.0, mode, interpolation)
    assert "\n" not in str(error.value)

"""Views against torchvision, timm and naive slices; they depend on seed, content and objective
alone.
"""

import io
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from timm.data import create_transform
from torchvision.transforms import v2

from companion.encoders import objectives as companions
from companion.encoders.objectives import FullAugmentation, distort, masked_crops
from companion.encoders.table import table
from fungi_core import DINO, KL, SimCLR, resampling, views
from fungi_core.inputs import Whole
from fungi_core.rows import view_batches
from fungi_core.seeds import content_id, generator
from fungi_core.views import Crops, ImageInputs, Patches

BICUBIC = v2.InterpolationMode.BICUBIC


def inputs(size, crop=1.0, mean=(0.0,) * 3, std=(1.0,) * 3):
    return ImageInputs(size, mean, std, crop)


def drawn(image, kind, size=32, name="dino", seed=0, device="cpu"):
    """What one image contributes to a batch, as `rows.view_batches` draws it."""
    takes = inputs(size)
    rng = generator(seed, name, content_id(takes.content(image)))
    return kind.draw(image, takes, rng, device)


def patches(x, **settings):
    """Cut patches of normalised images (B, 1, 3, s, s)."""
    pixels = (x.permute(0, 1, 3, 4, 2) * 255).contiguous()
    return Patches(**settings).finish(pixels, inputs(x.shape[-1]), torch.float32)


def picture(width=90, height=70, seed=0):
    """Smooth random colours: as a photograph, unlike noise, compresses and resizes without
    surprises.
    """
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.BICUBIC)


def noise(width, height, seed=0):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


# --- random resized crops


def torchvision_boxes(width, height, scale, n):
    """The oracle draws from torch's global generator, which is put back as it was."""
    image = torch.zeros(1, height, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = [v2.RandomResizedCrop(8, scale=scale).make_params([image]) for _ in range(n)]
    return np.array(
        [(p["left"], p["top"], p["left"] + p["width"], p["top"] + p["height"]) for p in drawn]
    )


def ours(width, height, scale, n, seed=0):
    return views.crop_boxes(width, height, np.array([scale] * n), np.random.default_rng(seed))


@pytest.mark.parametrize("scale", [(0.25, 1.0), (0.05, 0.25)], ids=["global", "local"])
@pytest.mark.parametrize(("width", "height"), [(64, 64), (500, 375), (120, 300)])
def test_crop_boxes_have_the_share_ratio_and_place_that_torchvision_draws(width, height, scale):
    boxes = ours(width, height, scale, 4000)
    left, top, right, bottom = boxes.T
    w, h = right - left, bottom - top
    assert (
        (left >= 0).all()
        and (top >= 0).all()
        and (right <= width).all()
        and (bottom <= height).all()
    )
    slack_area, slack_ratio = (
        (w + h) / 2 + 1,
        0.5 / h + 0.5 * w / h**2 + 0.01,
    )  # half a pixel of rounding a side
    assert (w * h >= scale[0] * width * height - slack_area).all()
    assert (w * h <= scale[1] * width * height + slack_area).all()
    assert (w / h >= 3 / 4 - slack_ratio).all() and (w / h <= 4 / 3 + slack_ratio).all()
    theirs = torchvision_boxes(width, height, scale, 2000)
    for mine, their in zip(
        marginals(boxes, width, height), marginals(theirs, width, height), strict=True
    ):
        assert kolmogorov(mine, their) < 0.06  # 0.054 is the 0.1 % point for 4000 and 2000 draws


def marginals(boxes, width, height):
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    free = lambda corner, size, side: corner / np.maximum(side - size, 1)
    return w * h, w / h, free(boxes[:, 0], w, width), free(boxes[:, 1], h, height)


def kolmogorov(a, b):
    """Largest distance of two empirical distribution functions."""
    at = np.sort(np.concatenate([a, b]))
    return np.abs(
        np.searchsorted(np.sort(a), at, "right") / len(a)
        - np.searchsorted(np.sort(b), at, "right") / len(b)
    ).max()


@pytest.mark.parametrize(("width", "height"), [(1, 500), (500, 1), (2, 90), (90, 3)])
def test_extreme_shapes_fall_back_as_torchvision_does(width, height):
    mine, theirs = (
        ours(width, height, (0.9, 1.0), 50),
        torchvision_boxes(width, height, (0.9, 1.0), 50),
    )
    assert (mine == mine[0]).all() and (mine == theirs).all()  # only the central crop is left


def test_a_fallback_touches_its_own_view_alone():
    scales = np.array([(0.9, 1.0), (0.01, 0.05), (0.9, 1.0)])
    boxes = views.crop_boxes(20, 100, scales, np.random.default_rng(0))
    assert (
        boxes[0].tolist() == boxes[2].tolist() == [0, 36, 20, 63]
    )  # 20 x round(20 * 4 / 3), centred
    area = (boxes[1, 2] - boxes[1, 0]) * (boxes[1, 3] - boxes[1, 1])
    assert 0.005 * 2000 < area < 0.06 * 2000


def test_one_pixel_and_every_small_size():
    assert ours(1, 1, (0.05, 0.25), 5).tolist() == [[0, 0, 1, 1]] * 5
    for width in range(1, 9):
        for height in range(1, 9):
            left, top, right, bottom = ours(width, height, (0.05, 1.0), 200, seed=width).T
            assert (0 <= left).all() and (left < right).all() and (right <= width).all()
            assert (0 <= top).all() and (top < bottom).all() and (bottom <= height).all()


def test_crops_are_torchvisions_resized_crops():
    image, kind = noise(80, 60), Crops()
    batch = kind.draw(image, inputs(32), np.random.default_rng(3), "cpu")
    scales = np.array([kind.global_scale] * 2 + [kind.local_scale] * 10)
    boxes = views.crop_boxes(80, 60, scales, np.random.default_rng(3))
    for view, (left, top, right, bottom) in zip(batch, boxes, strict=True):
        expected = v2.functional.resized_crop(
            image, top, left, bottom - top, right - left, [32, 32], BICUBIC
        )
        np.testing.assert_array_equal(view, np.asarray(expected))
    shares = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 4800
    assert shares[:2].min() > 0.24 and shares[2:].max() < 0.26  # two global, then ten local


# --- DINO's full augmentation


def numbers(**given):
    """A generator that gives these numbers: `distort` draws odds, amounts, order and radius, in
    this order.
    """
    odds = [
        0.0 if given.get(step) else 1.0 for step in ("flip", "jitter", "grey", "blur", "solarize")
    ]
    answers = iter([np.array(given.get("amounts", [1, 1, 1, 0])), given.get("radius", 1.0)])
    return SimpleNamespace(
        random=lambda n: np.array(odds),
        uniform=lambda low, high: next(answers),
        permutation=lambda n: np.array(given.get("order", range(n))),
    )


def test_each_step_of_the_full_augmentation_is_torchvisions():
    image, tf = picture(64, 64), v2.functional
    same = lambda got, expected: np.testing.assert_array_equal(
        np.asarray(got), np.asarray(expected)
    )
    same(distort(image, 1, numbers()), image)
    same(distort(image, 1, numbers(flip=True)), tf.horizontal_flip(image))
    same(distort(image, 1, numbers(grey=True)), tf.rgb_to_grayscale(image, 3))
    same(distort(image, 1, numbers(solarize=True)), tf.solarize(image, 128))
    radius = 1.5 * 64 / 224
    same(
        distort(image, 1, numbers(blur=True, radius=1.5)),
        image.filter(ImageFilter.GaussianBlur(radius)),
    )
    jitter = tf.adjust_brightness(
        tf.adjust_hue(tf.adjust_contrast(tf.adjust_saturation(image, 1.1), 0.7), 0.05), 1.3
    )
    drawn = numbers(jitter=True, amounts=[1.3, 0.7, 1.1, 0.05], order=[2, 1, 3, 0])
    same(distort(image, 1, drawn), jitter)


def test_the_full_augmentation_has_the_odds_of_dino(monkeypatch):
    """How often each step of main_dino.py is taken at each place, and how strongly."""
    calls, n = [], 1000
    keep = lambda step: lambda image, *amount, **_: (calls.append((step, *amount)), image)[1]
    steps = {
        "horizontal_flip": 0.5,
        "adjust_brightness": 0.8,
        "adjust_hue": 0.8,
        "rgb_to_grayscale": 0.2,
    }
    for step in steps:
        monkeypatch.setattr(companions.TF, step, keep(step))
    monkeypatch.setattr(companions.ImageOps, "solarize", keep("solarize"))
    blur = ImageFilter.GaussianBlur
    monkeypatch.setattr(
        companions.ImageFilter, "GaussianBlur", lambda r: (calls.append(("blur", r)), blur(r))[1]
    )
    image, rng = picture(56, 56), np.random.default_rng(0)
    for place, odds in enumerate([(1.0, 0.0), (0.1, 0.2), (0.5, 0.0)]):
        calls.clear()
        for _ in range(n):
            distort(image, place, rng)
        for step, expected in (steps | dict(zip(("blur", "solarize"), odds, strict=True))).items():
            share = sum(name == step for name, *_ in calls) / n
            assert abs(share - expected) < 0.05 and (share > 0) == (expected > 0), (
                place,
                step,
                share,
            )
    ranged = ("adjust_brightness", 0.6, 1.4), ("adjust_hue", -0.1, 0.1), ("blur", 0.025, 0.5)
    for step, low, high in ranged:  # blur: 0.1 to 2 px of 224 are 0.025 to 0.5 px of 56
        amounts, width = [call[1] for call in calls if call[0] == step], (high - low) / 50
        assert low <= min(amounts) < low + width and high - width < max(amounts) <= high


def test_the_full_augmentation_changes_colours_and_no_box():
    image, full = picture(), FullAugmentation()
    plain, coloured = drawn(image, Crops()), drawn(image, full)
    np.testing.assert_array_equal(coloured, drawn(image, full))
    assert plain.shape == coloured.shape and not np.array_equal(plain, coloured)
    places = [0, 1] + [2] * 10
    rng = generator(0, "dino", content_id(inputs(32).content(image)))
    views.crop_boxes(
        *image.size, np.ones((12, 2)) * 0.5, rng
    )  # as many numbers as the crops' boxes
    expected = [
        distort(Image.fromarray(v), place, rng) for v, place in zip(plain, places, strict=True)
    ]
    np.testing.assert_array_equal(coloured, np.stack([np.asarray(v) for v in expected]))


def test_masked_crops_lose_whole_patches_and_the_teacher_sees_all():
    batch = (
        torch.rand(2, 4, 3, 12, 12, generator=torch.Generator().manual_seed(0)) + 1
    )  # two global, two local crops
    masks = torch.zeros(2, 9, dtype=torch.bool)
    masks[0, 1] = masks[1, 8] = masks[1, 3] = True
    got, expected = masked_crops(batch, masks), torch.cat([batch, batch[:, :2]], 1)
    expected[:, 0, :, :4, 4:8] = 0  # patches row by row
    expected[:, 1, :, 8:, 8:] = expected[:, 1, :, 4:8, :4] = 0
    assert torch.equal(got, expected)


# --- resizing


@pytest.mark.parametrize(
    ("source", "target"),
    [(32, 64), (112, 224), (48, 96), (64, 24), (100, 33), (7, 7), (1, 5), (5, 2)],
)
def test_bicubic_matrix_is_torch_and_pil(source, target):
    across, down = (
        resampling.bicubic_matrix(source, target),
        resampling.bicubic_matrix(source + 3, target + 2),
    )
    basis = np.eye(
        source, dtype=np.float32
    )  # PIL resizes floats too: its weights, one column at a time
    columns = [
        np.asarray(Image.fromarray(row[None]).resize((target, 1), Image.BICUBIC))[0]
        for row in basis
    ]
    np.testing.assert_allclose(across.numpy().T, columns, atol=1e-7)
    image = noise(source, source + 3)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().contiguous()
    mine = down @ x @ across.T
    expected = F.interpolate(x[None], size=(target + 2, target), mode="bicubic", antialias=True)[0]
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=2e-3)
    pil = (
        torch.from_numpy(np.array(image.resize((target, target + 2), Image.BICUBIC)))
        .permute(2, 0, 1)
        .float()
    )
    assert (mine.clamp(0, 255) - pil).abs().mean() < (
        1.0 if target > source else 0.6
    )  # PIL rounds and clips after each axis
    assert mine.clamp(0, 255).sub(pil).abs().median() <= 0.5


@pytest.mark.parametrize("size", [64, 96, 224])
def test_patches_are_slices_that_torchvision_enlarges(size):
    x = torch.randn(2, 1, 3, size, size, generator=torch.Generator().manual_seed(0))
    patch, stride = size // 2, size // 12
    got = patches(x)
    assert got.shape == (2, 49, 3, size, size) and Patches().count(inputs(size)) == 49
    resize = v2.Resize([size, size], BICUBIC, antialias=True)
    corners = [(i * stride, j * stride) for i in range(7) for j in range(7)]  # row by row
    for view in (0, 1, 7, 30, 48):
        top, left = corners[view]
        expected = resize(x[:, 0, :, top : top + patch, left : left + patch])
        torch.testing.assert_close(got[:, view], expected, rtol=1e-4, atol=1e-5)


def test_number_of_patches_by_stride():
    counts = [Patches(stride=n).count(inputs(224)) for n in range(1, 9)]
    assert counts == [4, 9, 16, 25, 36, 49, 64, 81]  # the x-axis of Fig. 12
    x = torch.zeros(1, 1, 3, 96, 96)
    cut = [patches(x, stride=n).shape[1] for n in range(1, 9)]
    assert cut == [Patches(stride=n).count(inputs(96)) for n in range(1, 9)]
    assert patches(x, grid=1, stride=1).shape[1] == 1
    assert patches(x, native=True).shape == (1, 49, 3, 48, 48)
    with pytest.raises(ValueError, match="stride 49 is too fine for 48 px .* largest is 48"):
        patches(x, stride=49)


@pytest.mark.parametrize(
    ("width", "height"),
    [(90, 70), (70, 91), (64, 64), (31, 200), (5, 5), (1, 1), (1, 40), (333, 250)],
)
@pytest.mark.parametrize(("size", "ratio"), [(64, 1.0), (64, 0.9), (32, 0.875), (224, 0.95)])
def test_whole_is_the_transform_of_timm(width, height, size, ratio):
    image = noise(width, height)
    eval_transform = create_transform(
        (3, size, size), interpolation="bicubic", crop_pct=ratio, mean=(0,) * 3, std=(1,) * 3
    )
    expected = (eval_transform(image) * 255).round().byte().permute(1, 2, 0).numpy()
    got = inputs(size, ratio).whole(image)
    assert got.shape == (1, size, size, 3) and got.dtype == np.uint8
    np.testing.assert_array_equal(got[0], expected)


@pytest.mark.parametrize(
    "name",
    [n for n, row in table().items() if row.modality == "image" and row.gb and not row.url],
)
def test_the_papers_backbones_ask_for_the_transform_that_whole_makes(name):
    config = timm.get_pretrained_cfg(name)
    assert (config.crop_mode, config.interpolation) == ("center", "bicubic")


def test_patches_are_cut_from_the_squeezed_image():
    image = noise(90, 40)
    expected = v2.functional.resize(image, [32, 32], BICUBIC)
    np.testing.assert_array_equal(drawn(image, Patches())[0], np.asarray(expected))
    assert drawn(noise(32, 32), Patches())[0].tolist() == np.asarray(noise(32, 32)).tolist()


@pytest.mark.parametrize("objective", [KL(), DINO(), SimCLR()], ids=lambda o: o.name)
def test_finish_normalises_channel_by_channel(objective):
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    takes, kind = inputs(24, mean=mean, std=std), objective.views
    prepared = kind.draw(picture(), takes, generator(0), "cpu")
    batch = takes.stack([prepared] * 2)
    got = kind.finish(batch, takes, torch.float32)
    count = {"kl": 1, "dino": 12, "simclr": 49}[objective.name]
    assert got.shape == (2, count, 3, 24, 24) and kind.count(takes) == count
    norm = v2.Normalize(mean, std)(batch[0].permute(0, 3, 1, 2).float() / 255)
    expected = patches(norm[None])[0] if count == 49 else norm
    torch.testing.assert_close(got, torch.stack([expected] * 2))


# --- randomness: by seed, content and objective, nothing else


def test_views_depend_on_content_seed_and_objective_alone(tmp_path):
    image, kind = picture(), Crops()
    one = drawn(image, kind)
    for name in ("a.png", "folder_b.png"):
        image.save(tmp_path / name)
        np.testing.assert_array_equal(drawn(views.to_image(tmp_path / name), kind), one)
    drawn(picture(seed=1), kind)  # another image in between changes nothing
    np.testing.assert_array_equal(drawn(image, kind), one)
    assert not np.array_equal(drawn(image, kind, seed=1), one)
    assert not np.array_equal(drawn(image, kind, name="ibot"), one)
    pixel = np.array(image)
    pixel[-1, -1, -1] ^= 1
    assert not np.array_equal(drawn(Image.fromarray(pixel), kind), one)


def test_content_ids_see_the_shape():
    flat, takes = np.zeros((2, 8, 3), np.uint8), inputs(8)
    shapes = [Image.fromarray(flat.reshape(h, w, 3)) for h, w in ((2, 8), (4, 4), (8, 2))]
    assert len({content_id(takes.content(image)) for image in shapes}) == 3


def test_the_generator_is_the_same_on_every_platform():
    assert (
        generator("a", 1).integers(0, 1000, 6).tolist()
        == generator("a", 1).integers(0, 1000, 6).tolist()
    )
    assert generator("a", 1).integers(0, 1000, 6).tolist() == FROZEN
    assert generator("a", 2).integers(0, 1000, 6).tolist() != FROZEN


FROZEN = [364, 556, 593, 399, 304, 195]


def test_views_of_other_data_are_refused_in_one_line():
    from types import SimpleNamespace as Some

    from fungi_core.text import Deletions

    backbone = Some(inputs=inputs(32), name="net", device="cpu", view_dtype=torch.float32)
    with pytest.raises(
        ValueError, match="simclr takes Deletions, views of text data; net reads im"
    ):
        next(view_batches(backbone, Deletions(), "simclr", [picture()], 0))
    ((start, batch),) = view_batches(backbone, Whole(), "kl", [picture()], 0)
    assert start == 0 and batch.shape == (1, 1, 3, 32, 32)


# --- whatever an image comes as


def test_paths_pil_arrays_and_tensors_of_one_image_are_equal(tmp_path):
    image = picture()
    pixels = np.array(image)
    image.save(tmp_path / "a.png")
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    for item in (
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        image,
        pixels,
        tensor,
        tensor.float() / 255,
        tensor.double() / 255,
    ):
        got = views.to_image(item)
        assert got.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(got), pixels)
    half = views.to_image((tensor.float() / 255).half())
    assert np.abs(np.asarray(half).astype(int) - pixels).max() <= 1


def test_greyscale_palette_cmyk_transparency_and_sixteen_bits(tmp_path):
    image = picture()
    grey = np.array(image.convert("L"))
    for item in (
        grey,
        image.convert("L"),
        torch.from_numpy(grey),
        torch.from_numpy(grey).float() / 255,
    ):
        np.testing.assert_array_equal(np.asarray(views.to_image(item)), np.stack([grey] * 3, -1))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")  # 16 bits
    np.testing.assert_array_equal(
        np.asarray(views.to_image(tmp_path / "deep.png")), np.stack([grey] * 3, -1)
    )
    few = image.quantize(8)
    np.testing.assert_array_equal(np.asarray(views.to_image(few)), np.asarray(few.convert("RGB")))
    black = Image.new("CMYK", (4, 3), (0, 0, 0, 255))
    assert views.to_image(black).getpixel((0, 0)) == (0, 0, 0)
    clear = Image.new("RGBA", (4, 3), (10, 20, 30, 0))
    assert views.to_image(clear).getpixel((0, 0)) == (10, 20, 30)
    assert views.to_image(Image.new("1", (1, 1), 1)).getpixel((0, 0)) == (255, 255, 255)


def test_exif_rotation_of_a_file_is_undone(tmp_path):
    image = picture(20, 10)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 270 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(
        np.asarray(views.to_image(tmp_path / "turned.png")),
        np.asarray(image.transpose(Image.ROTATE_270)),
    )


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_a_corrupt_file_is_one_line_that_names_it(tmp_path, format):
    picture().save(raw := io.BytesIO(), format)
    rng, file, failed = np.random.default_rng(0), tmp_path / "broken.bin", 0
    for _ in range(40):
        data = bytearray(raw.getvalue())
        data = data[: rng.integers(len(data))]
        for place in rng.integers(0, max(len(data), 1), 4)[: len(data)]:
            data[place] = rng.integers(256)
        file.write_bytes(data)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's own remarks on what it skips
                views.to_image(file)
        except ValueError as error:
            failed += 1
            assert str(error).startswith(f"cannot read the image {file}: ") and "\n" not in str(
                error
            )
    assert failed > 5


def test_a_broken_png_chunk_and_a_truncated_open_image_are_value_errors(tmp_path):
    noise(300, 300).save(raw := io.BytesIO(), "PNG")
    data = bytearray(raw.getvalue())
    second = data.index(b"IDAT", data.index(b"IDAT") + 4)
    data[second : second + 4] = b"\xddf\xa2\xc2"  # Pillow: SyntaxError, broken PNG file
    (tmp_path / "chunk.png").write_bytes(data)
    with pytest.raises(ValueError, match="chunk.png: broken PNG"):
        views.to_image(tmp_path / "chunk.png")
    lazy = Image.open(io.BytesIO(raw.getvalue()[:2000]))
    with pytest.raises(ValueError, match="cannot read the image image 7: "):
        views.to_image(lazy, "image 7")


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (np.zeros((4, 4, 3)), "float64 array of shape (4, 4, 3)"),
        (np.zeros((4, 4, 4), np.uint8), "uint8 array of shape (4, 4, 4)"),
        (np.zeros((0, 4, 3), np.uint8), "uint8 array of shape (0, 4, 3)"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "int64 array of shape (4, 4, 3)"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "uint8 array of shape (2, 3, 4, 4)"),
        (None, "NoneType"),
        ([[0, 1]], "list"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_image_is_refused_by_name(item, words):
    with pytest.raises(ValueError) as error:
        views.to_image(item, "image 3")
    assert (
        str(error.value).startswith("image 3 is a")
        and words in str(error.value)
        and "\n" not in str(error.value)
    )


def test_a_file_that_is_missing_or_no_image(tmp_path):
    (tmp_path / "notes.txt").write_text("not an image")
    for name in ("notes.txt", "absent.png"):
        with pytest.raises(ValueError, match=f"cannot read the image .*{name}"):
            views.to_image(tmp_path / name)


@pytest.mark.parametrize("shape", [(37, 61), (300, 200), (40, 40)])
def test_crops_on_a_device_are_pils(shape):
    image = picture(seed=5).resize(shape[::-1], Image.BICUBIC)
    boxes = views.crop_boxes(
        *image.size, np.array([[0.25, 1.0]] * 4 + [[0.05, 0.25]] * 8), np.random.default_rng(1)
    )
    found = resampling.crops_on("cpu", image, 32, boxes)
    assert found.shape == (12, 32, 32, 3) and found.dtype == torch.uint8
    cut = [
        np.asarray(image.crop(tuple(map(int, box))).resize((32, 32), Image.BICUBIC))
        for box in boxes
    ]
    off = np.abs(found.numpy().astype(int) - np.stack(cut).astype(int))
    assert off.max() <= 2 and off.mean() < 0.35  # PIL rounds between the two axes


def test_a_gpu_cuts_the_same_boxes(monkeypatch):
    """Which way is taken depends on the device's name alone; the same boxes either way."""
    calls = []
    fake = lambda *args: calls.append(args) or torch.zeros(12, 32, 32, 3)
    monkeypatch.setattr(views, "crops_on", fake)
    drawn(picture(), Crops(), seed=3, device="cuda")
    ((device, image, size, boxes),) = calls
    assert device == "cuda" and size == 32
    plain = drawn(picture(), Crops(), seed=3)
    cut = [
        np.asarray(image.crop(tuple(map(int, box))).resize((32, 32), Image.BICUBIC))
        for box in boxes
    ]
    np.testing.assert_array_equal(plain, np.stack(cut))
    full = drawn(picture(), FullAugmentation(), seed=3, device="cuda")
    assert isinstance(full, np.ndarray)


@pytest.mark.cuda
def test_crops_of_a_gpu_are_those_of_the_cpu():
    on_card = drawn(picture(), Crops(), seed=3, device="cuda").cpu().numpy().astype(int)
    assert np.abs(on_card - drawn(picture(), Crops(), seed=3).astype(int)).max() <= 2


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_patches_of_a_gpu_are_those_of_the_cpu(dtype):
    takes, kind = ImageInputs(96, (0.5,) * 3, (0.25,) * 3), Patches()
    drawn_once = kind.draw(picture(), takes, np.random.default_rng(0), "cpu")
    pixels = torch.from_numpy(drawn_once.copy())[None]  # (1, 1, s, s, 3)
    on_card = kind.finish(pixels.cuda(), takes, dtype)
    expected = kind.finish(pixels, takes, torch.float32)
    close = 1e-5 if dtype == torch.float32 else 2e-2
    assert on_card.is_cuda and on_card.dtype == dtype and on_card.shape == (1, 49, 3, 96, 96)
    torch.testing.assert_close(on_card.cpu().float(), expected, rtol=close, atol=close)


@pytest.mark.parametrize("device", ["mps", "xpu:0"])
def test_devices_but_cuda_get_crops_cut_by_the_cpu(device):
    """Crops on the device are computed in float64, which not every kind of device has."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 50, 3), dtype=np.uint8)
    inputs = ImageInputs(16, (0.5,) * 3, (0.5,) * 3)
    image = Image.fromarray(pixels)
    a, b = (Crops().draw(image, inputs, generator(0), where) for where in (device, "cpu"))
    np.testing.assert_array_equal(a, b)

"""Inputs under fire: folders of photographs in which some files are broken, huge, odd, or no images
at all.
"""

import io
import os
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from companion import own, paths
from companion.data import images
from fungi_core import DINO, KL, Fungi, SimCLR, load, views
from fungi_core.extract import extract
from fungi_core.seeds import generator

SMALL = KL(dim=32)


def picture(seed: int = 0, width: int = 40, height: int = 30) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(
        0, 256, (height // 5, width // 5, 3), dtype=np.uint8
    )
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, **options) -> bytes:
    image.save(buffer := io.BytesIO(), "JPEG", quality=95, **options)
    return buffer.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG header of a huge image on a few bytes of data: what a decompression bomb looks like."""
    Image.new("L", (1, 1)).save(buffer := io.BytesIO(), "PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


GOOD = (
    *("animated.gif", "cmyk.jpg", "deep.png", "grey.png", "one_pixel.png"),
    *("palette.png", "plain.jpg", "turned.jpg", "wide.png"),
)
BAD = (
    "bomb.png",
    "corrupt.jpg",
    "empty.jpg",
    "named_wrongly.jpg",
    "notes.txt",
    "truncated.jpg",
    "vanished.jpg",
)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Two classes; in the first every kind of file that this project has ever been handed, sound or
    not.
    """
    root = tmp_path_factory.mktemp("photographs")
    odd, plain = root / "odd", root / "plain"
    odd.mkdir(), plain.mkdir()
    image = picture()
    image.save(odd / "plain.jpg", quality=95, subsampling=0)
    image.convert("CMYK").save(odd / "cmyk.jpg", quality=95)
    image.convert("L").save(odd / "grey.png")
    Image.fromarray(np.array(image.convert("L")).astype(np.uint16) * 257).save(odd / "deep.png")
    image.quantize(16).save(odd / "palette.png", transparency=3)
    image.save(odd / "animated.gif", save_all=True, append_images=[picture(1), picture(2)])
    Image.new("RGB", (1, 1), (9, 99, 199)).save(odd / "one_pixel.png")
    picture(3, 20_000, 10).save(odd / "wide.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    image.transpose(Image.Transpose.ROTATE_90).save(
        odd / "turned.jpg", exif=exif, quality=95, subsampling=0
    )
    whole = jpeg(picture(4, 200, 160))
    (odd / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (odd / "corrupt.jpg").write_bytes(bytes(200) + whole[200:])
    (odd / "empty.jpg").touch()
    (odd / "notes.txt").write_text("no image")
    (odd / "named_wrongly.jpg").write_text("<html>404</html>")
    (odd / "bomb.png").write_bytes(png_that_claims(20_000, 20_000))
    (odd / "vanished.jpg").symlink_to(odd / "nothing.jpg")
    (root / ".DS_Store").write_text("hidden files do not count")
    (root / ".thumbnails").mkdir()
    (root / ".thumbnails" / "a.jpg").write_bytes(jpeg(image))
    for i in range(3):
        picture(10 + i).save(plain / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def encoder():
    return load("random:test_vit", arguments={"img_size": 32}, device="cpu", dtype="float32")


def test_skipped_files_are_listed_with_their_reason(zoo):
    found = own.read(own.in_folder(zoo), {})
    assert found.names == [f"odd/{name}" for name in GOOD] + [f"plain/{i}.png" for i in range(3)]
    assert list(found.skipped) == [f"odd/{name}" for name in BAD]
    assert all(reason and "\n" not in reason for reason in found.skipped.values())
    assert "a link to nothing" in found.skipped["odd/vanished.jpg"]
    assert "decompression bomb" in found.skipped["odd/bomb.png"]
    assert found.classes == ["odd", "plain"] and found.labels.tolist() == [0] * len(GOOD) + [1] * 3
    part = found.take([4, 2])
    assert part.names == [found.names[4], found.names[2]] and part.skipped == found.skipped


def test_every_odd_kind_is_the_picture_that_a_person_sees(zoo):
    found = own.read(own.in_folder(zoo), {})
    image, by_name = picture(), dict(zip(found.names, found))
    grey = np.asarray(image.convert("L"), int)
    off = lambda name, expected: np.abs(np.asarray(by_name[f"odd/{name}"], int) - expected).mean()
    assert all(one.mode == "RGB" and not one.info for one in by_name.values())
    assert (
        off("plain.jpg", np.asarray(image, int)) < 4
        and off("turned.jpg", np.asarray(image, int)) < 4
    )
    assert off("cmyk.jpg", np.asarray(image, int)) < 8
    assert off("grey.png", grey[..., None]) == off("deep.png", grey[..., None]) == 0
    assert (
        off("palette.png", np.asarray(image, int)) < 30
        and off("animated.gif", np.asarray(image, int)) < 30
    )
    assert by_name["odd/one_pixel.png"].getpixel((0, 0)) == (9, 99, 199)
    assert by_name["odd/wide.png"].size == (20_000, 10)


def test_features_of_a_folder_are_each_images_own(zoo, encoder, monkeypatch, tmp_path):
    """Alone, from its file, an image gives the same row, so no index has moved."""
    monkeypatch.setenv("FUNGI_STORE", str(tmp_path))
    found = own.read(own.in_folder(zoo), {})
    rows = extract(found, encoder, [SMALL], root=paths.store_dir())
    assert rows.blocks["kl"].shape == (len(found), 64)
    for i in (0, 4, len(found) - 1):
        image = [zoo / found.names[i]]
        alone = Fungi(encoder, [SMALL], pca=None).fit(image).extract(image)
        for name, block in rows.blocks.items():
            np.testing.assert_allclose(block[i], alone[name][0], rtol=0, atol=1e-5)
    again = extract(own.read(own.in_folder(zoo), {}), encoder, [SMALL], root=paths.store_dir())
    assert again.keys == rows.keys


def test_a_pipe_is_no_photograph_and_nobody_waits_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    picture().save(tmp_path / "a.jpg")
    found = own.read(own.in_folder(tmp_path), {})
    assert found.names == ["a.jpg"] and list(found.skipped) == ["pipe.jpg"]


# --- images that are open already


def test_an_open_picture_is_turned_as_its_file_would_be(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in ("png", "jpg", "webp", "tiff"):
        picture().save(file := tmp_path / f"turned.{suffix}", exif=exif)
        with Image.open(file) as opened:
            turned = views.to_image(opened)
        np.testing.assert_array_equal(np.asarray(turned), np.asarray(views.to_image(file)), suffix)
        assert turned.size == (30, 40) and views.to_image(turned).size == (
            30,
            40,
        )  # once, not twice


def test_official_sets_are_read_as_torchvision_reads_them(tmp_path):
    """No turning there: the published code's loaders do none. Neither as data nor once the image is
    a view.
    """
    exif = Image.Exif()
    exif[0x0112] = 6
    picture().save(tmp_path / "turned.jpg", exif=exif)
    about = "official", "train", np.zeros(1, int), ["a"], "accuracy", ["a"]
    official = images.Images(*about, [tmp_path / "turned.jpg"], np.arange(1))
    assert official[0].size == views.to_image(official[0]).size == (40, 30)
    mine = own.read(own.in_folder(tmp_path), {})
    assert (
        mine[0].size == views.to_image(mine[0]).size == (30, 40)
        and mine.fingerprint != official.fingerprint
    )


# --- extreme shapes


MEAN = STD = (0.5, 0.5, 0.5)
INPUTS = views.ImageInputs(224, MEAN, STD, 0.875)


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (20_000, 7)])
@pytest.mark.parametrize("objective", [KL(), DINO(), SimCLR()], ids=lambda o: o.name)
def test_a_very_long_image_costs_no_more_memory_than_its_pixels(size, objective):
    """Its shorter side to 224 px would make 4.5 million pixels of the longer one: 3 GB. Only its
    middle is wanted.
    """
    image = Image.new("RGB", size, (10, 200, 30))
    largest = []
    real = Image.Image.resize

    def watched(self, wanted, *args, **kwargs):
        largest.append(wanted[0] * wanted[1])
        return real(self, wanted, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", watched)
        cut = objective.views.draw(image, INPUTS, generator("x", 0), "cpu")
    assert max(largest) <= 224 * 64 * 256 and cut.shape[1:] == (224, 224, 3)
    assert (np.asarray(cut) == (10, 200, 30)).all()


@pytest.mark.parametrize(("width", "height"), [(2800, 40), (31, 2100), (6000, 64), (7, 2113)])
@pytest.mark.parametrize(("size", "ratio"), [(64, 1.0), (224, 0.875), (32, 0.9)])
def test_the_middle_of_a_long_image_is_that_of_the_whole_resized(width, height, size, ratio):
    rng = np.random.default_rng(width)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    short = int(size / ratio)
    resized = [int(short * side / min(image.size)) for side in image.size]
    left, top = (round((side - size) / 2) for side in resized)
    expected = image.resize(resized, Image.BICUBIC).crop((left, top, left + size, top + size))
    found = views.ImageInputs(size, MEAN, STD, ratio).whole(image)[0]
    off = np.abs(
        found.astype(int) - np.asarray(expected, int)
    )  # Pillow clips between its two passes, of any order
    assert off.mean() < 0.5 and np.quantile(off, 0.97) <= 1


def test_a_panorama_above_pillows_first_limit_is_read_with_a_warning(tmp_path):
    """Between Pillow's limit and twice it, an image is read; the limit itself stays as it is."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        picture().save(tmp_path / "a.png")  # 1,200 pixels
        assert own.read(own.in_folder(tmp_path), {})[0].size == (40, 30)
    assert any(issubclass(one.category, Image.DecompressionBombWarning) for one in said)
    assert Image.MAX_IMAGE_PIXELS == 89_478_485


# --- a loss that is not finite names its image


@pytest.mark.parametrize("place", [0, 7])
def test_a_loss_that_is_nan_names_the_file(zoo, encoder, monkeypatch, tmp_path, place):
    monkeypatch.setenv("FUNGI_STORE", str(tmp_path))
    found = own.read(own.in_folder(zoo), {})
    intact, rows = KL.loss, []

    def broken(self, embeddings, *args):
        losses = intact(self, embeddings, *args)
        rows.append(len(losses))
        return losses * torch.where(torch.arange(len(losses)) == place, torch.nan, 1.0)

    monkeypatch.setattr(KL, "loss", broken)
    with pytest.raises(FloatingPointError) as error:
        extract(found, encoder, [SMALL], root=paths.store_dir())
    assert str(error.value) == f"the loss of {found.where(place)} is nan; nothing was written"
    files = [zoo / name for name in found.names]
    fungi = Fungi(encoder, [SMALL], pca=None)
    with pytest.raises(FloatingPointError, match=f"the loss of {files[place]} is nan"):
        fungi.fit(files)
    with pytest.raises(FloatingPointError, match=f"the loss of image {place} is nan"):
        fungi.fit([picture(i) for i in range(9)])
    with pytest.raises(FloatingPointError, match=f"the loss of image {place} is nan"):
        fungi.fit(torch.rand(9, 3, 32, 32))  # `where` is a method of tensors

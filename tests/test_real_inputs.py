"""What real people feed it: each public report of a neighbouring project that was tried, by its
kind, with the value that is right. `FAULTS.md` names the reports.

Tables of images are in `test_tables`, modes of torch in `test_modes`, saved files in
`test_saving`, one's own photographs in `test_own`, crops in `test_image_inputs`, paths with a space
in `test_make`.
"""

import io
import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import papermill
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.model_selection import train_test_split
from test_own import made
from test_run import folder  # noqa: F401 (a fixture)

from companion import own, run
from companion.data import datasets, folders, masks
from companion.encoders import loading, table
from companion.evaluate import clustering, knn, probe, retrieval
from companion.evaluate.cka import LinearCKA
from companion.figures import grids, style
from fungi_core import DINO, KL, Fungi, SimCLR, audio, devices, load
from fungi_core.extract import describe
from fungi_core.features import normalize
from fungi_core.rows import draw_negatives, draw_parts, gradient_rows
from fungi_core.views import Crops, ImageInputs, Patches, to_image

# --- a picture is the same picture in every form and mode


def _grey(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L"))


def _two_tones(image: Image.Image) -> np.ndarray:
    return (_grey(image) > 127).astype(np.uint8) * 255


def _cmyk(image: Image.Image) -> np.ndarray:
    ink = np.asarray(image.convert("CMYK"), int)
    return np.clip(255 - ink[..., :3] - ink[..., 3:], 0, 255).astype(np.uint8)


# mode -> (the picture in it, the pixels (H, W) or (H, W, 3) that a person sees)
MODES: dict[str, tuple[Callable, Callable]] = {
    "1": (lambda image: Image.fromarray(_two_tones(image)).convert("1"), _two_tones),
    "L": (lambda image: image.convert("L"), _grey),
    "LA": (lambda image: image.convert("LA"), _grey),
    "P": (lambda image: Image.fromarray(_grey(image)).convert("P"), _grey),
    "RGB": (lambda image: image, np.asarray),
    "RGBA": (lambda image: image.convert("RGBA"), np.asarray),
    "CMYK": (lambda image: image.convert("CMYK"), _cmyk),
    "I;16": (lambda image: Image.fromarray(_grey(image).astype(np.uint16) * 257), _grey),
    "I": (lambda image: image.convert("L").convert("I"), _grey),
    "F": (lambda image: image.convert("L").convert("F"), _grey),
}


def _colours(image: Image.Image, mode: str) -> np.ndarray:
    pixels = np.asarray(MODES[mode][1](image))
    return pixels if pixels.ndim == 3 else np.stack([pixels] * 3, -1)


def _file(image: Image.Image, mode: str, where) -> str:
    MODES[mode][0](image).save(where, "TIFF")
    return str(where)


# form -> item of X from the picture, its mode and where a file may lie
ITEMS: dict[str, Callable] = {
    "text of a path": _file,
    "path": lambda image, mode, where: type(where)(_file(image, mode, where)),
    "PIL": lambda image, mode, where: MODES[mode][0](image),
    "array": lambda image, mode, where: np.asarray(MODES[mode][1](image)),
    "tensor": lambda image, mode, where: torch.tensor(_colours(image, mode)).permute(2, 0, 1),
    "float": lambda image, mode, where: (
        torch.tensor(_colours(image, mode)).permute(2, 0, 1).float() / 255
    ),
}


def _shuffled(items: list) -> list[int]:
    return np.random.default_rng(len(items)).permutation(len(items)).tolist()


CONTAINERS: dict[str, Callable] = {
    "list": list,
    "tuple": tuple,
    "generator turned list": lambda items: list(item for item in items),
    "Series": lambda items: pd.Series(items, index=_shuffled(items), dtype=object),
    "frame": lambda items: pd.DataFrame({"image": pd.Series(items, dtype=object)}),
    "array of objects": lambda items: pd.Series(items, dtype=object).to_numpy(),
}


def picture(seed: int, width: int = 44, height: int = 36) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def fitted() -> Fungi:
    encoder = loading.load("vit_micro.sup_tin100", device="cpu", dtype="float32")
    return Fungi(encoder, [KL()], pca=None).fit([picture(0)])


def test_every_form_of_every_mode_is_the_same_picture(fitted, tmp_path):
    image, tried = picture(1), set()
    expected = fitted.transform([_colours(image, mode) for mode in MODES])
    for form, container in [*product(ITEMS, ["list"]), *product(["PIL", "array"], CONTAINERS)]:
        items = [ITEMS[form](image, mode, tmp_path / f"{i}.tiff") for i, mode in enumerate(MODES)]
        found = fitted.transform(CONTAINERS[container](items))
        np.testing.assert_array_equal(found, expected, f"{form} in a {container}")
        tried |= {(form, container, mode) for mode in MODES}
    assert len(tried) == (len(ITEMS) + 2 * (len(CONTAINERS) - 1)) * len(MODES) == 160
    assert {mode for mode, (draw, _) in MODES.items() if draw(image).mode != mode} == set()


@given(
    pictures=st.lists(
        st.tuples(
            st.sampled_from(list(ITEMS)),
            st.sampled_from(list(MODES)),
            st.integers(0, 9),
            st.integers(1, 90),
            st.integers(1, 90),
        ),
        min_size=1,
        max_size=4,
    ),
    container=st.sampled_from(list(CONTAINERS)),
)
@settings(max_examples=25)
def test_any_mixture_of_forms_and_modes_gives_equal_rows(
    fitted, tmp_path_factory, pictures, container
):
    where = tmp_path_factory.mktemp("forms")
    items, arrays = [], []
    for i, (form, mode, seed, width, height) in enumerate(pictures):
        image = picture(seed, width, height)
        items.append(ITEMS[form](image, mode, where / f"{i}.tiff"))
        arrays.append(_colours(image, mode))
    found = fitted.transform(CONTAINERS[container](items))
    np.testing.assert_array_equal(found, fitted.transform(arrays))


# --- rows in the order of X


def test_a_shuffled_series_keeps_pictures_and_labels_together(fitted):
    images, labels = pd.Series([picture(i) for i in range(8)]), pd.Series(range(8))
    x, _, y, _ = train_test_split(images, labels, test_size=0.25, random_state=0)
    assert list(x.index) != sorted(x.index) and 0 not in x.iloc[1:3].index
    expected = fitted.transform([picture(i) for i in y])
    for found in (fitted.transform(x), fitted.transform(x.to_frame())):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(fitted.extract(x)["kl"], fitted.extract(list(x))["kl"])
    assert knn.knn_predict(expected, y, fitted.transform(x), 1).tolist() == y.tolist()
    assert knn.vote(np.arange(6)[:, None], y).tolist() == y.tolist()


def test_a_series_of_sounds_counts_by_rows():
    encoder = loading.load("vit_micro.on_spectrograms", device="cpu", dtype="float32")
    rng = np.random.default_rng(0)
    sounds = [(rng.random(audio.RATE // 4) - 0.5).astype(np.float32) for _ in range(3)]
    expected = Fungi(encoder, [KL(dim=32)], pca=None).fit_transform(sounds)
    series = pd.Series(sounds, index=[2, 0, 1])
    found = Fungi(encoder, [KL(dim=32)], pca=None).fit_transform(series)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("one", [np.zeros((30, 20, 3), np.uint8), torch.zeros(3, 30, 20)])
def test_one_image_is_no_sequence_of_lines(fitted, one):
    with pytest.raises(ValueError, match=r"X is one image, of shape .*; X is a sequence of them"):
        fitted.transform(one)


# --- values out of range


@pytest.mark.parametrize(
    ("scaled", "found"),
    [
        (lambda x: x * 255, "from 0 to 255"),
        (lambda x: 2 * x - 1, "from -1 to 1"),
        (lambda x: (x - 0.5) / 0.25, "from -2 to 2"),
        (lambda x: x * torch.nan, "from nan to nan"),
        (lambda x: x / 0, "from nan to nan"),
        (lambda x: x + 0.01, "from 0.01 to 1.01"),
    ],
)
def test_a_float_tensor_out_of_range_is_one_line_with_its_range(fitted, scaled, found):
    pixels = torch.linspace(0, 1, 3 * 30 * 20).reshape(3, 30, 20)
    with pytest.raises(ValueError) as error:
        fitted.transform([pixels, scaled(pixels)])
    assert str(error.value) == (
        f"image 1 is a float tensor with values {found}; accepted: float in [0, 1], before any "
        "normalisation, or uint8"
    )


def test_rounding_of_a_float_tensor_is_no_fault():
    pixels = torch.rand(3, 9, 9, generator=torch.Generator().manual_seed(0))
    pixels[0, 0, :2] = torch.tensor([-1e-6, 1 + 1e-6])
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        expected = (pixels.to(dtype).float() * 255).round().permute(1, 2, 0)
        np.testing.assert_array_equal(np.asarray(to_image(pixels.to(dtype))), expected)


@pytest.mark.parametrize(
    "values",
    [
        np.linspace(0, 1, 600, dtype=np.float32),
        np.linspace(0, 65535, 600).astype(np.int32),
        np.linspace(-1, 254, 600).astype(np.int32),
        np.full(600, np.nan, np.float32),
    ],
    ids=["shares", "16 bits", "negative", "nan"],
)
def test_pixels_of_32_bits_that_pillow_would_cut_are_one_line(values, tmp_path):
    image = Image.fromarray(values.reshape(30, 20))
    image.save(file := tmp_path / "a.tiff")
    for item in (image, file):
        with pytest.raises(ValueError, match=r"mode [IF] with values from .*; accepted: 0 to 255"):
            to_image(item)
    assert "accepted: 0 to 255" in own.decode(file)  # named among what is skipped


# --- metrics that accumulate


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (torch.rand(2, 3), torch.rand(2, 4)),
        (torch.full((8, 3), torch.nan), torch.rand(8, 4)),
        (torch.rand(8, 3), torch.rand(8, 4) + torch.inf),
        (torch.rand(8, 5), torch.rand(8, 4)),
        (torch.rand(8, 3), torch.rand(7, 4)),
        (torch.ones(8, 3), torch.rand(8, 4)),
    ],
    ids=["two rows", "nan", "infinite", "another width", "other rows", "constant"],
)
def test_a_bad_batch_leaves_what_was_accumulated(x, y):
    draw = torch.Generator().manual_seed(0)
    first = torch.rand(64, 3, generator=draw), torch.rand(64, 4, generator=draw)
    metric, alone = LinearCKA(), LinearCKA()
    metric.update(*first), alone.update(*first)
    with pytest.raises(ValueError, match="^CKA "):
        metric(x, y)
    assert metric.n == 64 and metric.compute() == alone.compute()
    more = torch.rand(9, 3, generator=draw), torch.rand(9, 4, generator=draw)
    value = metric(*more)
    alone.reset(), alone.update(*more)
    assert metric.n == 73 and value == alone.compute()


# --- readers of folders

JUNK = (
    *(".ipynb_checkpoints/x", "__MACOSX/x", "@eaDir/x", "$RECYCLE.BIN/x", "cat/._x", "cat/.x"),
    *("cat/Thumbs.db", "cat/desktop.ini", "cat/.ipynb_checkpoints/x", "Thumbs.db"),
)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """An empty data folder."""
    monkeypatch.setenv("FUNGI_DATA", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def _write(file, content: bytes = b"junk") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def _picture(file, seed: int = 0, format: str | None = None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(file, format)


def _litter(where, suffix: str, inside: str = "cat") -> None:
    """Leave what systems leave, under names that the readers look for."""
    for name in (name.replace("cat/", f"{inside}/") for name in JUNK):
        _write(where / (name if "." in name.rpartition("/x")[2] else name + suffix))


def test_links_nested_folders_rare_suffixes_and_leftovers_in_every_reader_of_photographs(data):
    kinds = {"a.jfif": "JPEG", "b.gif": "GIF", "c.JPG": "JPEG", "deep/er/d.png": "PNG"}
    for part in ("train", "test"):
        for name, kind in kinds.items():
            _picture(data / "mine" / part / "cat" / name, format=kind)
        _litter(data / "mine" / part, ".png")
        (data / "mine" / part / "dog").symlink_to(data.parent / "elsewhere")
        (data / "mine" / part / "cat" / "loop").symlink_to(data / "mine" / part / "cat")
    _picture(data.parent / "elsewhere" / "e.png")
    names = [*(f"cat/{name}" for name in kinds), "dog/e.png"]
    for part in ("train", "test"):
        named = datasets.load("mine", part)
        assert named.classes == ["cat", "dog"] and named.labels.tolist() == [0, 0, 0, 0, 1]
        assert sorted(named.names) == sorted(f"{part}/{name}" for name in names)
    photographs = own.read(own.in_folder(data / "mine" / "train"), {})
    assert photographs.classes == ["cat", "dog"] and not photographs.skipped
    assert sorted(photographs.names) == sorted(names)
    with zipfile.ZipFile(packed := io.BytesIO(), "w") as archive:
        for name, file in folders.files(data / "mine" / "train"):
            archive.write(file, name)
        for name in JUNK:
            archive.writestr(name, b"junk")
    uploaded, failed = own.unpacked([("set.zip", packed.getvalue())])
    assert sorted(name for name, _ in uploaded) == sorted(names) and not failed


def test_leftovers_in_the_readers_of_official_archives(data):
    forest = data / "eurosat" / "2750"
    for name in ("AnnualCrop", "Forest"):
        for i in range(10):
            _picture(forest / name / f"{name}_{i}.jpg", i)
    _litter(forest, ".jpg", "Forest")
    sizes = [len(datasets.load("eurosat", part)) for part in ("train", "test")]
    assert sizes == [16, 4] and datasets.load("eurosat", "test").classes == ["AnnualCrop", "Forest"]
    speech = data / "speech_commands_v0.02"
    for name in ("cat/a.wav", "cat/b.wav", "_background_noise_/c.wav"):
        _write(speech / name)
    _litter(speech, ".wav")
    _write(speech / "testing_list.txt", b"cat/b.wav\n")
    _write(speech / "validation_list.txt", b"")
    found = datasets.load("speech_commands_v2", "train")
    assert found.names == ["cat/a.wav"] and found.classes == ["cat"]
    scenes = data / "ADEChallengeData2016"
    _picture(scenes / "images" / "validation" / "a.jpg")
    _litter(scenes / "images" / "validation", ".jpg")
    _write(scenes / "objectInfo150.txt", b"Idx\tName\n1\twall\n")
    assert masks.load("ade20k", "test").names == ["a"]


def test_a_scene_sets_name_that_is_taken_is_said(data):
    _write(data / "composed.npz")
    taken = r"the name of .*composed.npz is taken: .*; rename it"
    with pytest.raises(datasets.DatasetUnavailable, match=taken):
        masks.load("composed", "train")


# --- labels

X = np.repeat(np.eye(3), 10, 0) + np.random.default_rng(0).normal(0, 0.01, (30, 3))
Y = np.repeat(np.arange(3), 10)
TAKES_LABELS = {
    "knn_predict": lambda y: knn.knn_predict(X, y, X, 3),
    "knn_by_similarity": lambda y: knn.knn_by_similarity(X @ X.T, y, 3),
    "vote": lambda y: knn.vote(np.arange(30)[:, None], y),
    "few_shot_indices": lambda y: knn.few_shot_indices(y, 2),
    "bootstrap": lambda y: knn.bootstrap(Y > 0, generator=np.random.default_rng(0), labels=y),
    "probe": lambda y: probe.predict(X, y, X, seed=0),
    "same_class": lambda y: retrieval.same_class(y, y),
    "match": lambda y: clustering.match(Y, y),
}


@pytest.mark.parametrize("takes", TAKES_LABELS)
def test_labels_are_a_vector_of_any_kind_and_nothing_else(takes):
    given, expected = TAKES_LABELS[takes], repr(TAKES_LABELS[takes](Y))
    shuffled = pd.Series(Y, index=np.random.default_rng(1).permutation(30))
    for form in (Y.tolist(), shuffled, torch.from_numpy(Y)):
        assert repr(given(form)) == expected
    for wrong in (Y[:, None], np.eye(3, dtype=int)[Y], pd.DataFrame({"y": Y}), None):
        with pytest.raises(ValueError, match=r"one a row|one sample a row") as error:
            given(wrong if wrong is not None else np.array(0))
        assert "\n" not in str(error.value)


# --- sounds


def test_channels_are_averaged_on_either_side():
    rng = np.random.default_rng(0)
    left, right = (rng.random((2, 4000)) - 0.5).astype(np.float32)
    mean = (left + right) / 2
    for sound in (np.stack([left, right]), np.stack([left, right], 1)):
        for form in (sound, torch.tensor(sound), torch.tensor(sound).requires_grad_()):
            np.testing.assert_allclose(audio.decode(form), mean, rtol=0, atol=1e-7)
    np.testing.assert_array_equal(audio.decode(left[None]), left)
    np.testing.assert_array_equal(audio.decode(left[:, None]), left)
    low = audio.decode(torch.tensor(left).bfloat16())
    np.testing.assert_allclose(low, left, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    "sound", [np.zeros((80, 300)), np.zeros((300, 80)), np.zeros((1, 2, 9)), np.zeros(9, np.int16)]
)
def test_a_filter_bank_is_no_waveform(sound):
    with pytest.raises(ValueError, match=r"clip 3 is a .* array of shape .*; a waveform is float"):
        audio.decode(sound, "clip 3")


# --- devices and torch's state


@pytest.mark.parametrize("device", ["xpu", "mps:7", "hpu"])
def test_a_device_that_is_not_here_or_holds_no_numbers_is_one_line(device):
    with pytest.raises(ValueError, match=rf"device '{device}' is none: .*; use 'auto'") as error:
        devices.resolve_device(device)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("precision", ["medium", "high"])
def test_float32_products_are_float32_whatever_the_caller_allows(precision):
    torch.set_float32_matmul_precision(precision)
    use = torch.backends
    kinds = use.mkldnn.matmul, use.cuda.matmul, use.cudnn.conv
    before = [kind.fp32_precision for kind in kinds]
    try:
        with devices.default_modes():
            assert [kind.fp32_precision for kind in kinds] == ["ieee"] * 3
        assert [kind.fp32_precision for kind in kinds] == before != ["ieee"] * 3
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")


# --- names


def test_a_name_with_dollars_is_no_formula_in_any_figure(tmp_path):
    names, image = [r"$\frac$", "a$b^$", r"$x$ \$"], picture(0)
    tile = {"image": image, "title": names[0]}
    drawn = [
        grids.image_grid([image] * 3, names, ncols=3),
        grids.neighbours(tile, {"E": [tile, tile | {"title": names[1]}]}),
        grids.image_map(np.eye(3)[:, :2], [image] * 3, [0, 1, 2], names),
    ]
    for fig in drawn:
        fig.savefig(io.BytesIO())
    assert [ax.get_title() for ax in drawn[0].axes] == names
    assert own.short("a/$1$.jpg") == "$1$"


def test_the_names_that_cameras_give_stay_apart():
    """They begin alike."""
    names = [f"trip/IMG_20240711_18{i:02d}59.jpg" for i in range(9)] + ["a/IMG_0001.JPG"]
    assert len({own.short(name) for name in names}) == 10
    assert own.short(names[3]) == "…1_180359" and own.short(names[-1]) == "IMG_0001"


def test_a_name_with_markup_is_text_in_a_table():
    name = "<img src=x> & <b>"
    html = style.show_table(pd.DataFrame({"name": [name], "cosine": [0.5]})).to_html()
    assert "&lt;img src=x&gt; &amp; &lt;b&gt;" in html and name not in html


def test_a_link_is_a_link_in_a_table_whose_other_cells_are_text():
    link = '<a href="02.ipynb">02</a>'
    html = style.show_table(pd.DataFrame({"page": [link], "said": [link]}), html=["page"]).to_html()
    assert html.count(link) == 1 and html.count("&lt;a href=") == 1


def test_a_name_that_is_not_utf8_is_read_named_and_saved(data, tmp_path, fitted):
    pytest.importorskip("pyarrow")
    foreign = data / "mine" / os.fsdecode(b"\xff\xfe.png")
    for i, name in enumerate(("a.png", "b.png", foreign.name)):
        _picture(data / "mine" / name, i)
    photographs = own.read(own.in_folder(data / "mine"), {})
    uploaded, _ = own.unpacked([(foreign.name, foreign.read_bytes())])
    assert photographs.names == ["a.png", "b.png", r"\udcff\udcfe.png"]
    assert uploaded[0][0] == photographs.names[-1]
    album = replace(made(np.eye(3)), data=photographs)
    npz, parquet = own.save(album, tmp_path / "features")
    assert np.load(npz)["name"].tolist() == pd.read_parquet(parquet)["name"].tolist()
    foreign.write_bytes(b"no image")
    for read in (lambda: fitted.transform([foreign]), lambda: audio.decode(foreign)):
        with pytest.raises(ValueError, match=r"cannot read the .*udcff\\udcfe.png") as error:
            read()
        str(error.value).encode()  # it can be printed


# --- archives


def _zip(*members: tuple[str, bytes]) -> bytes:
    with zipfile.ZipFile(made := io.BytesIO(), "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    return made.getvalue()


def _encoded(format: str = "PNG", **options) -> bytes:
    picture(0).save(made := io.BytesIO(), format, **options)
    return made.getvalue()


TWO = _zip(("cat/1.png", _encoded()), ("dog/2.png", _encoded()))


def _altered(at: dict[int, int]) -> bytes:
    out = bytearray(TWO)
    for place, value in at.items():
        out[place] = value
    return bytes(out)


DIRECTORY = TWO.find(b"PK\x01\x02")
DAMAGED = {
    "checksum": _altered({TWO.find(b"IDAT") + 9: TWO[TWO.find(b"IDAT") + 9] ^ 255}),
    "encrypted": _altered({6: 1, DIRECTORY + 8: 1}),
    "unknown compression": _altered({8: 99, DIRECTORY + 10: 99}),
}


@pytest.mark.parametrize(
    ("inside", "names"),
    [
        (["./cat//1.png", "dog/./2.png"], ["cat/1.png", "dog/2.png"]),
        (["cat\\1.png", "dog\\2.png"], ["cat/1.png", "dog/2.png"]),
        (["set/cat/1.png", "set/dog/2.png"], ["cat/1.png", "dog/2.png"]),
        (["../../cat/1.png", "/dog/2.png"], ["cat/1.png", "dog/2.png"]),
        (["a/1.png", "a/1.png"], ["a/1.png", "a/1 (2).png"]),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_in_a_zip_are_paths_inside_it(inside, names):
    content = _zip(*((name, _encoded()) for name in inside))
    found, skipped = own.unpacked([("x.zip", content)])
    assert [name for name, _ in found] == names and not skipped
    photographs = own.read(found, skipped)
    assert photographs.classes == sorted({name.split("/")[0] for name in names})


@pytest.mark.parametrize("fault", DAMAGED)
def test_one_member_that_cannot_be_read_costs_no_other(fault):
    found, skipped = own.unpacked([("x.zip", DAMAGED[fault]), ("b.png", _encoded())])
    assert [name for name, _ in found] == ["dog/2.png", "b.png"]
    assert list(skipped) == ["cat/1.png"] and "\n" not in skipped["cat/1.png"]


def test_a_photograph_that_holds_a_zips_signature_is_a_photograph():
    inside = _encoded("JPEG", comment=b"PK\x03\x04 and PK\x05\x06" + bytes(18))
    for content in (inside, _encoded("JPEG") + TWO):
        found, skipped = own.unpacked([("a.jpg", content)])
        photographs = own.read(found, skipped)
        assert photographs.names == ["a.jpg"] and not photographs.skipped


@pytest.mark.parametrize("member", ["split", "labels", "names"])
def test_a_packed_file_with_a_bad_checksum_is_named(data, member):
    content = np.frombuffer(_encoded(), np.uint8)
    blob = {"data": content, "offsets": np.array([0, len(content)])}
    about = {"split": np.zeros(1, np.uint8), "names": np.array(["a"]), "classes": np.array(["c"])}
    np.savez(data / "mine.npz", **blob, **about, labels=np.zeros(1, np.int16))
    masked = {f"mask_{name}": array for name, array in blob.items()}
    np.savez(data / "scenes.npz", **blob, **masked, **about)
    assert len(datasets.load("mine", "train")) == len(masks.load("scenes", "train")) == 1
    for load_set, name in ((datasets.load, "mine"), (masks.load, "scenes")):
        file = data / f"{name}.npz"
        with zipfile.ZipFile(file) as archive:
            if f"{member}.npy" not in archive.namelist():
                continue
            place = archive.getinfo(f"{member}.npy")
        out = bytearray(file.read_bytes())
        header = place.header_offset + 30
        length = int.from_bytes(out[header - 4 : header - 2], "little")
        extra = int.from_bytes(out[header - 2 : header], "little")
        out[header + length + extra + place.file_size - 1] ^= 255
        file.write_bytes(out)
        with pytest.raises(ValueError, match=rf"{name}.npz is damaged: .*{member}") as error:
            load_set(name, "train")
        assert "\n" not in str(error.value)


# --- bfloat16


def _ramp(low: int, high: int) -> Image.Image:
    line = np.linspace(low, high, 96).astype(np.uint8)
    return Image.fromarray(np.tile(line, (96, 1))).convert("RGB")


def _all_kinds() -> dict[str, Image.Image]:
    """Flat, smooth, tiled and natural images; two are of sky, whose patches hardly differ."""
    photographs = datasets.load("photos", "test", limit=64)
    tile = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    made = {colour: Image.new("RGB", (96, 96), colour) for colour in ("black", "white", "grey")}
    made |= {"smooth": _ramp(0, 255), "nearly flat": _ramp(100, 107)}
    made |= {"tiled": Image.fromarray(np.tile(tile, (6, 6, 1)))}
    return made | {photographs.names[i]: photographs[i] for i in (3, 46, 10, 30)}


BELOW = [KL(), DINO(Crops(local_count=2)), SimCLR(Patches(stride=4), negatives=8)]


@pytest.fixture(scope="module", params=["vit_micro.sup_tin100", "deit_tiny_patch16_224.fb_in1k"])
def pair(request):
    """The same network in float32 and in bfloat16."""
    if reason := table.unavailable(request.param):
        pytest.skip(f"{request.param} needs {reason}")
    return [
        loading.load(request.param, device="cpu", dtype=dtype) for dtype in ("float32", "bfloat16")
    ]


def _parts(backbone, objective):
    photographs = datasets.load("photos", "test", limit=64).take(np.arange(1, 64, 5))
    part = draw_parts(backbone, objective, 0)
    part.negatives = draw_negatives(backbone, objective, part.heads, photographs, 0)
    return part


def _rows(backbone, objective, parts, items) -> list[np.ndarray]:
    made = [blocks for _, _, blocks in gradient_rows(backbone, objective, parts, items, 0)]
    return [np.concatenate(blocks) for blocks in zip(*made, strict=True)]


@pytest.mark.parametrize("objective", BELOW, ids=lambda one: one.name)
def test_in_bfloat16_every_image_has_float32s_gradient(objective, pair):
    _compare(objective, pair)


@pytest.mark.parametrize("pair", ["vit_micro.sup_tin100"], indirect=True)
def test_nine_views_are_enough_for_it_on_the_64_px_network(pair):
    """On DeiT-Ti/16 one of sky has 0.977 then, and 0.99 with 25."""
    _compare(SimCLR(Patches(stride=2), negatives=12), pair)


def _compare(objective, pair):
    images, part = _all_kinds(), _parts(pair[0], objective)
    exact, low = (_rows(one, objective, [part], list(images.values()))[0] for one in pair)
    cosines = (normalize(exact) * normalize(low)).sum(1)
    assert cosines.min() >= 0.99, dict(zip(images, cosines.round(4), strict=True))
    assert not np.array_equal(exact, low)  # most of them are bfloat16's


def test_patches_are_embedded_in_float32_and_nothing_else_is(pair):
    exact, low = pair
    kinds = {name: weight.dtype for name, weight in low.model.state_dict().items()}
    assert {*kinds.values()} == {torch.float32, torch.bfloat16}
    assert all(
        (kind == torch.float32) == name.startswith("patch_embed.") for name, kind in kinds.items()
    )
    for name, weight in exact.model.patch_embed.state_dict().items():
        assert torch.equal(low.model.patch_embed.state_dict()[name], weight)  # never rounded
    assert (low.view_dtype, exact.view_dtype) == (torch.float32, torch.float32)
    seen = low.embed(torch.zeros(1, 3, low.inputs.size, low.inputs.size, dtype=torch.bfloat16))
    assert seen.dtype == torch.bfloat16  # views in another dtype are taken, too


# --- networks


class Returns(torch.nn.Module):
    """A network whose forward gives what ``made`` makes of the embeddings."""

    def __init__(self, made: Callable, **changes):
        super().__init__()
        self.inner, self.made = timm.create_model("test_vit", num_classes=0, **changes), made

    def forward(self, views):
        return self.made(self.inner(views))


def _without_gradients(out: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return out.clone()


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Returns(lambda x: {"out": x}), "Returns gives a dict; its forward must give embeddings"),
        (Returns(lambda x: (x, x)), "Returns gives a tuple; its forward must give embeddings"),
        (Returns(lambda x: [x]), "Returns gives a list; its forward must give embeddings"),
        (Returns(lambda x: None), "Returns gives a NoneType; its forward must give embeddings"),
        (Returns(lambda x: x[..., None]), r"a tensor of shape \(1, 64, 1\); its forward must give"),
        (Returns(lambda x: x, in_chans=1), r"cannot take views of shape \(1, 3, 224, 224\)"),
        (Returns(_without_gradients), "no gradient leads from the embedding to layer 'inner.blo"),
        (Returns(torch.detach), "no gradient leads from the embedding to layer 'inner.blocks"),
    ],
)
def test_a_network_that_cannot_serve_is_one_line(module, message):
    one = Fungi(module, [KL(dim=8)], layer="inner.blocks.5.attn.proj", device="cpu", pca=None)
    with pytest.raises(ValueError, match=message) as error:
        one.fit([picture(0)])
    assert "\n" not in str(error.value)


def test_every_pretrained_name_of_timm_has_its_transform_or_says_why_not():
    squares, modes = 0, set()
    for name in timm.list_pretrained():
        config = timm.get_pretrained_cfg(name).to_dict()
        mode = config.get("crop_mode") or "center", config["interpolation"]
        ImageInputs(224, config["mean"], config["std"], config["crop_pct"], *mode)
        modes.add(mode)
        squares += config["input_size"][1] == config["input_size"][2]
    assert {"squash", "border", "center"} == {mode for mode, _ in modes} and squares > 1500
    with pytest.raises(ValueError, match="takes images of 64 x 96 px; accepted: squares"):
        load("random:test_vit", arguments={"img_size": (64, 96)}, device="cpu")


def test_crop_mode_and_interpolation_are_part_of_the_key(fitted):
    data = datasets.load("photos", "test", limit=2)
    keys = set()
    for mode, interpolation in product(("center", "squash", "border"), ("bicubic", "bilinear")):
        inputs = replace(fitted.backbone_.inputs, mode=mode, interpolation=interpolation)
        backbone = replace(fitted.backbone_, inputs=inputs)
        keys.add(json.dumps(describe(data, backbone), sort_keys=True))
    assert len(keys) == 6


# --- parameters of a command line


@pytest.mark.parametrize(
    ("text", "annotation", "default", "value"),
    [
        ("9e-1", "float", 0.5, 0.9),
        ("1e3", "float", 0.5, 1000.0),
        ("010", "int", 1, 10),
        ("2024", "str", "x", "2024"),
        ("no", "str", "x", "no"),
        ("[2024, no, 1e3, 2024-01-01]", "list", ["x"], ["2024", "no", "1e3", "2024-01-01"]),
        ("[9e-1, 2]", "list", [0.5], [0.9, 2]),
        ("true", "bool", False, True),
        ("1:30", "int", 1, "1:30"),  # no 90: refused, as text
    ],
)
def test_a_parameter_is_read_as_its_type_takes_it(text, annotation, default, value):
    parameter = {"type": annotation, "default": default, "help": ""}
    found = run.parsed(text, parameter)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("shares", "[a]", "parameter 'shares' lists numbers, not 'a'"),
        ("names", [2024], "parameter 'names' lists names, not 2024"),
    ],
)
def test_a_list_of_the_wrong_kind_is_one_line(name, value, message):
    exist = {
        "shares": {"type": "list", "default": [0.5]},
        "names": {"type": "list", "default": ["x"]},
    }
    value = run.parsed(value, exist[name]) if isinstance(value, str) else value
    with pytest.raises(ValueError, match=message):
        run.check("01_fine", name, value, exist)


def test_an_output_that_is_a_folder_is_one_line_before_any_kernel(
    folder,  # noqa: F811
    tmp_path,
    capsys,
    monkeypatch,
):
    monkeypatch.setattr(
        papermill, "execute_notebook", lambda *a, **k: pytest.fail("a kernel was started")
    )
    assert run.main(["01_fine", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path} is a folder; name a file in it, such as" in error
    assert error.count("\n") == 1
    (tmp_path / "file").touch()
    assert run.main(["01_fine", "--out", str(tmp_path / "file" / "x.ipynb")]) == 2
    assert capsys.readouterr().err.count("\n") == 1

"""A reader's own photographs: what is read and what is named, neighbours by hand, leave-one-out,
files written.
"""

import io
import itertools
import os
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
from helpers import entries
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from companion import explore, own, paths, run
from companion.data.images import Images
from companion.encoders import loading
from companion.figures import grids
from fungi_core import extract, load
from fungi_core.features import normalize


def jpeg(seed: int, size=(64, 48), **options) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(
        file := io.BytesIO(), "JPEG", **options
    )
    return file.getvalue()


def made(embedding, labels=None, **blocks) -> extract.Features:
    """An album whose features are given."""
    n = len(embedding)
    labels = np.zeros(n, int) if labels is None else np.asarray(labels)
    classes = [f"c{i}" for i in range(labels.max() + 1)]
    names = [f"{i}.jpg" for i in range(n)]
    pixels = [np.full((4, 4, 3), i, np.uint8) for i in range(n)]
    images = Images("own", "train", labels, classes, "accuracy", names, pixels, np.arange(n))
    blocks = {"embedding": np.asarray(embedding, np.float32)} | blocks
    return extract.Features(images, blocks, ())


@pytest.fixture
def folder(tmp_path):
    """Two classes of two images, one that is cut off, one that is no image, and hidden files."""
    for i, name in enumerate(("cat/a.jpg", "cat/b.jpg", "dog/old/a.jpg", "dog/b.png")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(jpeg(i))
    (tmp_path / "cat" / "aa_cut.jpg").write_bytes(jpeg(9)[:400])
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    for hidden in (".DS_Store", "cat/._a.jpg"):
        (tmp_path / hidden).write_bytes(b"x")
    return tmp_path


def test_a_folder_gives_its_sub_folders_as_classes_and_names_what_it_leaves_out(folder):
    images = own.read(own.in_folder(folder), {})
    assert images.names == ["cat/a.jpg", "cat/b.jpg", "dog/b.png", "dog/old/a.jpg"]
    assert images.classes == ["cat", "dog"] and images.labels.tolist() == [0, 0, 1, 1]
    assert list(images.skipped) == ["cat/aa_cut.jpg", "dog/notes.txt"]
    assert all(images.skipped.values())
    for name, image in zip(images.names, images, strict=True):  # no index has moved
        with Image.open(folder / name) as opened:
            assert np.array_equal(np.asarray(image), np.asarray(opened.convert("RGB")))


@pytest.mark.parametrize(
    "where, message", [("nowhere", "is no folder; give a folder"), ("", "no files there")]
)
def test_a_folder_that_cannot_serve_is_one_clear_line(tmp_path, where, message):
    with pytest.raises(ValueError, match=message):
        own.read(own.in_folder(tmp_path / where), {})


def test_uploaded_files_and_a_zipped_folder_say_the_same_as_the_folder(folder):
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.write(
                file, f"holiday/{file.relative_to(folder)}"
            )  # as a file manager zips a folder
    images = own.read(*own.unpacked([("holiday.zip", zipped.getvalue())]))
    expected = own.read(own.in_folder(folder), {})
    order = [images.names.index(name) for name in expected.names]
    assert (
        images.take(order).fingerprint == expected.fingerprint
        and images.classes == expected.classes
    )
    assert images.skipped == expected.skipped


def test_a_note_beside_the_class_folders_of_a_zip_takes_no_class_away(folder):
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("holiday/README.txt", "from my camera")
        archive.write(folder / "cat" / "a.jpg", "holiday/cat/a.jpg")
        archive.write(folder / "dog" / "b.png", "holiday/dog/b.png")
    images = own.read(*own.unpacked([("holiday.zip", zipped.getvalue())]))
    assert images.classes == ["cat", "dog"] and list(images.skipped) == ["README.txt"]


def test_a_name_uploaded_twice_is_numbered_and_nothing_is_lost():
    images = own.read(*own.unpacked([("a.jpg", jpeg(0)), ("a.jpg", jpeg(1)), ("b.jpg", jpeg(2))]))
    assert images.names == ["a.jpg", "a (2).jpg", "b.jpg"] and images.classes == ["(no folder)"]


def test_photographs_are_turned_upright_and_reduced_but_small_ones_left_alone():
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright
    assert own.reduced(jpeg(0, (64, 48), exif=turned)).size == (48, 64)
    assert own.reduced(jpeg(0, (2400, 1600))).size == (768, 512)
    with Image.open(io.BytesIO(jpeg(0))) as opened:
        assert np.array_equal(np.asarray(own.reduced(jpeg(0))), np.asarray(opened))


def test_a_large_jpeg_is_close_to_what_a_full_decode_and_resize_give():
    content = jpeg(3, (4000, 3000))
    with Image.open(io.BytesIO(content)) as opened:
        whole = np.asarray(opened.resize((683, 512), Image.Resampling.BICUBIC), float)
    assert np.abs(np.asarray(own.reduced(content), float) - whole).mean() < 1


def test_neighbours_and_pairs_worked_by_hand():
    album = made(
        [[1, 0], [0.8, 0.6], [0, 1], [-1, 0]]
    )  # cosines: 0-1 0.8, 0-2 0, 0-3 -1, 1-2 0.6, 1-3 -0.8, 2-3 0
    query, found = own.tiles(album, 0, {"embedding": "E"}, 2)
    said = [(tile["title"], tile["right"]) for tile in found["embedding"]]
    assert query["title"] == "0.jpg" and said == [("1\n0.80", None), ("2\n0.00", None)]
    classes = own.tiles(
        replace(album, data=replace(album.data, classes=["a", "b"])), 0, {"": "E"}, 1
    )
    assert classes[1][""][0]["right"] is True
    pairs = own.near_duplicates(album)
    assert pairs[["first", "second"]].values.tolist()[:2] == [[0, 1], [1, 2]] and len(pairs) == 6
    assert pairs["cosine"].tolist() == pytest.approx([0.8, 0.6, 0, 0, -0.8, -1], abs=1e-6)
    assert len(own.tiles(album, 0, {"": "E"}, 9)[1][""]) == 3  # all others, never the image itself


def test_similarity_is_the_mean_cosine_of_the_features_asked_for():
    rng = np.random.default_rng(0)
    album = made(rng.normal(size=(5, 4)), kl=rng.normal(size=(5, 3)).astype(np.float32))
    unit = {name: normalize(block) for name, block in album.blocks.items()}
    expected = (unit["embedding"][1] @ unit["embedding"][3] + unit["kl"][1] @ unit["kl"][3]) / 2
    assert own.cosines(album, "E+K")[1, 3] == pytest.approx(expected, abs=1e-6)


def test_leave_one_out_is_scikit_learns_on_all_others():
    rng = np.random.default_rng(1)
    x, y = (
        normalize(rng.normal(size=(40, 6)) + 2 * np.eye(6)[np.arange(40) % 3]),
        np.arange(40) % 3,
    )
    right = []
    for i in range(40):
        rest = np.arange(40) != i
        right.append(KNeighborsClassifier(5).fit(x[rest], y[rest]).predict(x[i : i + 1])[0] == y[i])
    table = own.accuracy(made(x, y), ["E"], k=5)
    assert table["value"].iloc[0] == pytest.approx(100 * np.mean(right))
    assert table["low"].iloc[0] < table["value"].iloc[0] < table["high"].iloc[0]


def test_shots_of_one_scene_have_no_vote_on_each_other():
    x = np.array([[1, 0], [1, 0.001], [0, 1], [0.001, 1]])  # two pairs of twins, a class each
    assert own.accuracy(made(x, [0, 0, 1, 1]), ["E"], k=1, apart=1)["value"].iloc[0] == 100
    assert own.accuracy(made(x, [0, 0, 1, 1]), ["E"], k=1, apart=0.99)["value"].iloc[0] == 0


@pytest.mark.parametrize("method", ["t-SNE", "PCA"])
def test_a_map_keeps_two_groups_apart_and_repeats(method):
    rng = np.random.default_rng(2)
    album = made(np.repeat(np.eye(8)[:2], 12, 0) + 0.05 * rng.normal(size=(24, 8)))
    at = own.places(album, "E", method)
    within = max(np.linalg.norm(at[:12] - at[:12].mean(0), axis=1).mean(), 1e-6)
    assert at.shape == (24, 2) and np.linalg.norm(at[:12].mean(0) - at[12:].mean(0)) > 2 * within
    assert np.array_equal(at, own.places(album, "E", method))


def test_what_is_saved_reads_back_with_names(tmp_path):
    pytest.importorskip("pyarrow")
    rng = np.random.default_rng(3)
    album = made(
        rng.normal(size=(4, 5)), [0, 1, 0, 1], kl=rng.normal(size=(4, 5)).astype(np.float32)
    )
    files = own.save(album, tmp_path / "deep" / "features")
    arrays, table = np.load(files[0]), pd.read_parquet(files[1])
    assert arrays["name"].tolist() == table["name"].tolist() == album.data.names
    assert arrays["class"].tolist() == table["class"].tolist() == ["c0", "c1", "c0", "c1"]
    for name, width in {"embedding": 5, "kl": 5, "fungi": 10}.items():
        assert arrays[name].shape == (4, width) and np.array_equal(
            np.stack(table[name]), arrays[name]
        )
    assert np.linalg.norm(arrays["fungi"], axis=1) == pytest.approx(np.sqrt(2), abs=1e-6)
    before = [file.read_bytes() for file in files]
    assert [file.read_bytes() for file in own.save(album, tmp_path / "deep" / "features")] == before


def test_the_same_picture_twice_has_no_vote_on_itself_and_is_listed_first():
    album = made([[1, 0], [1, 0], [0.6, 0.8]], [0, 0, 1])
    assert own.near_duplicates(album).iloc[0].tolist() == [0, 1, 1.0]
    assert (
        own.accuracy(album, ["E"], k=1, apart=0.98)["value"].iloc[0] == 0
    )  # the other class votes
    assert own.accuracy(album, ["E"], k=1, apart=1)["value"].iloc[0] == pytest.approx(200 / 3)


def test_identical_features_have_one_place():
    assert np.array_equal(own.places(made(np.ones((5, 3))), "E"), np.zeros((5, 2)))


def test_a_cut_zip_is_named_and_the_rest_is_read():
    """One damaged archive does not cost the other files."""
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        archive.writestr("x/a.jpg", jpeg(0))
    cut = file.getvalue()[:-30]
    images = own.read(*own.unpacked([("x.zip", cut), ("b.jpg", jpeg(1))]))
    assert images.names == ["b.jpg"] and list(images.skipped) == ["x.zip"]


def test_an_album_extracts_once_and_writes_features_only(folder, tmp_path_factory, monkeypatch):
    small = load("random:test_vit", arguments={"img_size": 32}, device="cpu", dtype="float32")
    monkeypatch.setenv("FUNGI_STORE", str(tmp_path_factory.mktemp("store")))
    here = {p for p in folder.rglob("*")}
    ask = lambda **more: own.album((), folder, encoder=small, names=["kl"], **more)
    album = ask()
    assert set(album.blocks) == {"embedding", "kl"} and len(album.data.skipped) == 2
    shards = {p: p.stat().st_mtime_ns for p in paths.store_dir().rglob("*.npy")}
    files = [
        (p.relative_to(folder).as_posix(), p.read_bytes())
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    ]
    again = own.album(files, encoder=small, names=["kl"])
    assert np.array_equal(
        again.blocks["kl"], album.blocks["kl"]
    )  # uploaded: the same rows, from the store
    assert {p: p.stat().st_mtime_ns for p in paths.store_dir().rglob("*.npy")} == shards
    assert {p for p in folder.rglob("*")} == here and entries(paths.store_dir())[0]["meta"]["data"]
    few, decode, seen = ask(n=4), own.decode, []
    assert len(few.data) == 4 - len(few.data.skipped) and few.data.note == "4 of 6 files, seed 0"
    monkeypatch.setattr(own, "decode", lambda source: seen.append(source) or decode(source))
    assert ask(n=4).data.names == few.data.names and len(seen) == 4  # no other file was read
    os.remove(folder / "cat" / "a.jpg"), os.remove(folder / "cat" / "b.jpg")
    with pytest.raises(
        ValueError, match="2 readable images; neighbours need 3 .*aa_cut.jpg, dog/notes.txt"
    ):
        ask()


def test_names_of_neighbours_do_not_touch():
    """The most that the slider gives, each with as long a name as there is."""
    title = f"{own.short('trip/IMG_20240101_123456.jpg')}\n0.50"
    wide = [{"image": np.zeros((8, 8)), "title": title}] * 6
    fig = grids.neighbours({"image": np.zeros((8, 8)), "title": "query"}, {"FUNGI": wide})
    fig.draw_without_rendering()
    boxes = [ax.title.get_window_extent() for ax in fig.axes if "…" in ax.get_title()]
    boxes.sort(key=lambda box: box.x0)
    assert len(boxes) == 6
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def test_the_page_knows_the_photographs_before_the_views_of_them_are_drawn():
    """A view saves files: they are never written as the last album's, or as the profile's."""
    notebook = nbformat.read(run.NOTEBOOKS / "20_your_own_data.ipynb", as_version=4)
    (cell,) = [cell.source for cell in notebook.cells if "explore.chooser(" in cell.source]
    page, mine = SimpleNamespace(used=[], parameters={"folder": ""}), explore.Watched()
    space = {"mine": mine, "page": page, "own": SimpleNamespace(album=lambda *_, **__: album)}
    space |= dict(layer="", objectives=[], n=0, seed=0, loading=loading)
    exec(cell.partition("explore.chooser(")[0], space)
    album, seen = made(np.eye(3)), []
    mine.observe(lambda _: seen.append((mine.value, page.parameters["folder"], page.used)), "value")
    space["load"]((), "holiday", name := "vit_micro.sup_tin100")
    assert seen == [(album, "holiday", [(name, "own", album, album)])]
    with pytest.raises(ValueError, match="unknown backbone 'vit_tiny_typo'"):
        space["load"]((), "nowhere", "vit_tiny_typo")
    assert len(seen) == 1  # nothing was read, and the views stay as they are


def test_the_menu_offers_what_is_here_and_then_the_rest_with_its_size(monkeypatch, tmp_path):
    monkeypatch.setenv("FUNGI_DATA", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    packaged = ["vit_mini.sup_tin100", "vit_micro.sup_tin100", "vit_mini.simclr_tin100"]
    first, rest = (offered := own.networks())[:3], offered[3:]
    assert first == packaged and "vit_base_patch16_224.dino (not here: 0.34 GB)" in rest
    assert all(" (not here: " in name for name in rest) and not any("bert" in x for x in offered)

"""Folders of one's own: what is skipped, what breaks later, taken names, halves of sets."""

import shutil

import numpy as np
import pytest
from helpers import entries
from PIL import Image

from companion import own, paths
from companion.data import datasets, images
from fungi_core import KL, load
from fungi_core.extract import describe, extract


@pytest.fixture
def encoder(monkeypatch, tmp_path):
    monkeypatch.setenv("FUNGI_STORE", str(tmp_path / "store"))
    return load("random:test_vit", arguments={"img_size": 32}, device="cpu", dtype="float32")


@pytest.fixture
def plain(monkeypatch, tmp_path):
    """A named set of three photographs, ``copy/train`` and ``copy/test``: its training folder."""
    folder = tmp_path / "data" / "copy"
    (folder / "train" / "plain").mkdir(parents=True)
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "train" / "plain" / f"{i}.png")
    shutil.copytree(folder / "train", folder / "test")
    monkeypatch.setenv("FUNGI_DATA", str(tmp_path / "data"))
    return folder / "train" / "plain"


def test_the_metadata_lists_what_was_skipped(plain, encoder):
    assert "skipped" not in describe(own.read(own.in_folder(plain), {}), encoder)
    (plain / "broken.png").write_bytes(b"no image")
    found = own.read(own.in_folder(plain), {})
    extract(found, encoder, [KL(dim=32)], root=paths.store_dir())
    made = entries(paths.store_dir())
    assert len(made) == 3  # the embedding, the gradients and the trunk they are made from
    for entry in made:
        assert entry["meta"]["skipped"] == ["broken.png"]
        assert entry["n"] == entry["done"] == len(found) == 3


def test_a_file_that_breaks_after_it_was_listed_is_named_and_nothing_is_written(plain, encoder):
    found = datasets.load("copy", "train")
    (plain / "1.png").write_bytes(b"gone")
    with pytest.raises(ValueError, match=r"copy train\[1\] \(.*1.png\) cannot be read as an image"):
        extract(found, encoder, [KL(dim=32)], root=paths.store_dir())
    assert entries(paths.store_dir()) == []


def test_own_files_are_hashed_whole_however_many(plain, monkeypatch):
    monkeypatch.setattr(images, "MANY_FILES", 0)
    before = datasets.load("copy", "train").fingerprint
    data = bytearray((plain / "1.png").read_bytes())
    data[-1] ^= 1
    (plain / "1.png").write_bytes(data)  # as long as before
    assert datasets.load("copy", "train").fingerprint != before


def test_folders_without_an_image(tmp_path):
    with pytest.raises(ValueError, match="absent is no folder"):
        own.read(own.in_folder(tmp_path / "absent"), {})
    with pytest.raises(ValueError, match="no files there"):
        own.read(own.in_folder(tmp_path), {})
    (tmp_path / "notes.txt").write_text("no image")
    found = own.read(own.in_folder(tmp_path), {})
    assert len(found) == 0 and list(found.skipped) == ["notes.txt"]
    with pytest.raises(ValueError, match=r"0 readable images; .*\(not readable: notes.txt\)"):
        own.album(folder=tmp_path, encoder=None, names=["kl"])


@pytest.mark.parametrize("name", ["digits", "pydocs", "esc50_fold1"])
def test_a_name_that_is_taken_is_said(name, tmp_path, monkeypatch):
    monkeypatch.setenv("FUNGI_DATA", str(tmp_path))
    for part in ("train", "test"):
        (tmp_path / name / part / "a").mkdir(parents=True)
    taken = rf"the name of .*{name} is taken: .*; rename it"
    with pytest.raises(datasets.DatasetUnavailable, match=taken):
        datasets.load(name, "train")
    row = {row["name"]: row for row in datasets.table()}[name]
    assert not row["available"] and "is taken" in datasets.missing(datasets.find(name))


def test_half_a_folder_set_is_unknown_and_an_empty_one_unavailable(tmp_path, monkeypatch):
    monkeypatch.setenv("FUNGI_DATA", str(tmp_path))
    (tmp_path / "half/train/cat").mkdir(parents=True)
    with pytest.raises(ValueError, match="unknown data set 'half'"):
        datasets.load("half", "train")
    (tmp_path / "half/test").mkdir()
    with pytest.raises(
        datasets.DatasetUnavailable, match="half .*no images in class folders under .*train"
    ):
        datasets.load("half", "train")

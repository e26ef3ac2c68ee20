"""What the throughput notebook prints beside its timings."""

import json

import numpy as np
import pytest
import torch
from helpers import shrink_test_vit

from companion import throughput
from companion.data import datasets
from fungi_core import backbones


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(backbones, "auto_device", lambda: "cpu")
    shrink_test_vit(monkeypatch)
    return monkeypatch


def test_precision_is_one_in_float32_and_near_it_in_bf16(small):
    images = datasets.load("photos", "test", limit=16)
    small.setattr(backbones, "auto_dtype", lambda device: torch.float32)
    same = throughput.precision("random:test_vit", images, ["kl", "dino"])
    assert same["features"].tolist() == ["E", "K", "D"] and np.allclose(
        same[["mean", "median", "lowest"]], 1
    )
    assert (same["below 0.99"] == 0).all()
    small.setattr(backbones, "auto_dtype", lambda device: torch.bfloat16)
    low = throughput.precision("random:test_vit", images, ["kl"]).set_index("features")
    assert (low["dtype"] == "bfloat16").all() and (low["lowest"] <= low["median"]).all()
    assert low.loc["E", "mean"] > 0.99 and low.loc["E", "mean"] < 1  # another dtype was really used


def test_published_runs_are_read_from_their_files(tmp_path):
    one = lambda speed, gib: {"images_per_second": speed, "peak_bytes": gib * 2**30}
    record = {"backbone": "random:vit", "machine": {"processor": "P", "cores": 2}, "published": {}}
    for name, (ours, theirs) in {"kl": (60, 15), "simclr": (6, 1)}.items():
        record["published"][name] = {
            "ours": one(ours, 1),
            "published": one(theirs, 2),
            "ratio": ours / theirs,
        }
    (tmp_path / "speed_here.json").write_text(json.dumps(record))
    (tmp_path / "memory_here.json").write_text("{}")  # another kind of file
    found = throughput.against_published(tmp_path).set_index("features")
    assert found.loc["K", ["value", "published", "ratio"]].tolist() == [60, 15, 4]
    assert found.loc["S", ["memory", "published_memory"]].tolist() == [1, 2]
    assert (found["machine"] == "P, 2 cores").all() and (found["backbone"] == "vit").all()
    assert throughput.against_published(tmp_path / "none").empty

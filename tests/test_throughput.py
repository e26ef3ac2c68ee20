"""What the throughput notebook prints beside its timings."""

import importlib
import inspect
import json
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch

from companion import paths, throughput
from companion.data import datasets
from companion.encoders import loading
from fungi_core import DINO, KL, load


@pytest.fixture
def small(monkeypatch):
    """Return what makes every network small, on the CPU, and "auto" a given dtype."""

    def patch(auto):
        def small_load(name, *, device="cpu", dtype="auto"):
            dtype = auto if dtype == "auto" else dtype
            return load(name, arguments={"img_size": 32}, device="cpu", dtype=dtype)

        monkeypatch.setattr(throughput, "load", small_load)

    return patch


def test_precision_is_one_in_float32_and_near_it_in_bf16(small):
    images = datasets.load("photos", "test", limit=16)
    small(torch.float32)
    same = throughput.precision("random:test_vit", images)
    assert same["features"].tolist() == ["E", "K", "D", "S"]
    assert np.allclose(same[["mean", "median", "lowest"]], 1) and (same["below 0.99"] == 0).all()
    small(torch.bfloat16)
    low = throughput.precision("random:test_vit", images).set_index("features")
    assert (low["dtype"] == "bfloat16").all() and (low["lowest"] <= low["median"]).all()
    means = low["mean"]  # another dtype was really used, for each of them
    assert (means < 1 - 1e-7).all() and means["E"] > 0.99 and (means > 0.9).all()


def test_ratios_are_speed_over_floor(monkeypatch):
    """Given seconds, worked by hand: 12 images of one view, then one image of 12."""
    backbone = loading.load("random:test_vit", device="cpu", dtype="float32")
    warm, kl, dino = [9, 9], [2, 3, 2, 4], [2, 1, 4, 1]  # stock, ours, stock, ours
    given = iter([*warm, *kl, *warm, *dino])
    monkeypatch.setattr(throughput, "seconds", lambda call, device: next(given))
    found = throughput.measure(backbone, [KL(), DINO()], views_a_call=12, repeats=2)
    assert found["features"].tolist() == ["K", "D"] and found["views"].tolist() == [1, 12]
    numbers = found.set_index("features").drop(columns="views").T
    k = dict(value=(4 + 3) / 2, floor=6, ratio=(4 / 6 + 3 / 6) / 2, ratio_low=0.5, ratio_high=4 / 6)
    d = dict(value=1, floor=(1 / 2 + 1 / 4) / 2, ratio=3, ratio_low=2, ratio_high=4)
    assert numbers["K"].to_dict() == pytest.approx(k)
    assert numbers["D"].to_dict() == pytest.approx(d)


def test_peak_memory_is_that_of_the_program_that_was_started(monkeypatch):
    """What getrusage says of it is what the one that started it held."""
    monkeypatch.syspath_prepend(paths.ROOT / "benchmarks")
    function = inspect.getsource(importlib.import_module("run").peak_bytes)
    code = f"import re\nfrom pathlib import Path\n{function}\nprint(peak_bytes())"
    held = np.ones(2**25)  # 256 MiB
    found = int(subprocess.check_output([sys.executable, "-c", code]))
    assert 2**20 < found < held.nbytes / 2


def test_the_floor_is_timms_forward_pass_on_the_same_weights():
    backbone = loading.load("random:test_vit", device="cpu", dtype="float32")
    x = torch.rand(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = throughput.plain_model(backbone)(x)
    torch.testing.assert_close(found, backbone.embed(x), rtol=1e-4, atol=1e-4)


def test_published_runs_are_read_from_their_files(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    one = lambda speed, gib: {"images_per_second": speed, "peak_bytes": gib * 2**30}
    record = {"backbone": "random:vit", "machine": {"processor": "P", "cores": 2}, "published": {}}
    for name, (ours, theirs) in {"kl": (60, 15), "simclr": (6, 1)}.items():
        record["published"][name] = {
            "ours": one(ours, 1),
            "published": one(theirs, 2),
            "ratio": ours / theirs,
        }
    (folder / "speed_here.json").write_text(json.dumps(record))
    (folder / "memory_here.json").write_text("{}")  # another kind of file
    found = throughput.against_published().set_index("features")
    assert found.loc["K", ["value", "published", "ratio"]].tolist() == [60, 15, 4]
    assert found.loc["S", ["memory", "published_memory"]].tolist() == [1, 2]
    assert (found["machine"] == "P, 2 cores").all() and (found["backbone"] == "vit").all()


def test_every_stage_of_an_extraction_is_timed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(paths.ROOT / "benchmarks")
    stages = runpy.run_path(str(paths.ROOT / "benchmarks" / "stages.py"))["stages"]
    backbone = load("random:test_vit", device="cpu")
    found, flops = stages("kl", backbone, tmp_path, 1)
    assert [*found] == ["decode", "views", "trunk", "tail, loss", "projection", "write"]
    assert min(found.values()) > 0 and flops > 0

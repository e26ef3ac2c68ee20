"""`benchmarks/gpu.py` goes through every case on the CPU: a card's first run is no trial."""

import importlib
import json
import os
import subprocess
import sys

import pytest

from companion import paths
from fungi_core import kernels

CASES = ["cuda_tests", "kernel", "views", "precision", "speed", "patches", "published"]


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """Return the cases of a dry run by name, as its record has them, and what it printed."""
    results, out = paths.ROOT / "benchmarks" / "results", tmp_path_factory.mktemp("dry") / "it.json"
    before, command = sorted(results.iterdir()), [sys.executable, "benchmarks/gpu.py", "--dry"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    options = dict(cwd=paths.ROOT, env=environment, capture_output=True, text=True, timeout=900)
    done = subprocess.run([*command, "--out", str(out)], **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert sorted(results.iterdir()) == before  # nothing but the file that was named
    record = json.loads(out.read_text())
    assert record["parameters"]["dry"] and record["card"] is None
    return {case["case"]: case for case in record["cases"]}, done.stdout


@pytest.fixture
def gpu(monkeypatch):
    """Return the benchmark as a module."""
    monkeypatch.syspath_prepend(paths.ROOT / "benchmarks")
    return importlib.import_module("gpu")


def test_every_case_ran_or_says_why_not(dry):
    cases, printed = dry
    assert list(cases) == CASES
    may_be_skipped = {"cuda_tests": "no CUDA device", "published": "is not installed"}
    if kernels.triton is None:
        may_be_skipped["kernel"] = "no build for this platform"
    for name, case in cases.items():
        assert f"{name}: {case['status']}" in printed
        if case["status"] == "ran":
            assert case["rows"]
        else:
            reason = case["status"].removeprefix("skipped: ")
            assert reason != case["status"] and may_be_skipped[name] in reason


def test_what_is_compared_agrees(dry):
    cases, _ = dry
    for row in cases["kernel"]["rows"]:
        assert row["difference"] <= {"float32": 1e-5, "bfloat16": 1e-2}[row["dtype"]]
    shapes = {row["shape"] for row in cases["kernel"]["rows"]}
    assert len(shapes) == (2 if kernels.triton else 0)  # gradients of images and of patches
    assert {row["views"] for row in cases["views"]["rows"]} == {"crops", "patches"}
    assert all(row["largest"] <= 2 and row["mean"] < 0.35 for row in cases["views"]["rows"])
    cosines = {row["features"]: row["lowest"] for row in cases["precision"]["rows"]}
    assert list(cosines) == ["E", "K", "D", "S"] and min(cosines.values()) > 0.99
    assert {row["dtype"] for row in cases["precision"]["rows"]} == {"bfloat16"}


def test_speeds_and_memory_are_positive_and_targets_are_the_designs(dry):
    cases, _ = dry
    rows = cases["speed"]["rows"]
    names = [row["features"] for row in rows]
    assert names == ["stock embedding", "kl", "dino", "simclr"]
    assert [row["views"] for row in rows] == [1, 1, 12, 49]
    assert all(row["images_per_second"] > 0 for row in rows)
    targets = [row.get("target") for row in rows]
    assert targets == [None, "ratio >= 1", "ratio >= 0.95", "ratio >= 0.95"]
    for row in rows[1:]:
        assert row["met"] == (row["ratio"] >= float(row["target"].split()[-1]))
    stock, every, projection = cases["patches"]["rows"]
    assert stock["share_of_stock"] == 1 and 0 < every["share_of_stock"] < 1
    assert projection["target"] == "share >= 0.6" and projection["gflops"] > 0
    for row in cases["published"]["rows"]:
        ours, theirs = row["ours_images_per_second"], row["published_images_per_second"]
        assert row["ratio"] == pytest.approx(ours / theirs)


def test_without_a_card_it_says_so(gpu, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="there is no CUDA device; --dry"):
        gpu.main()


def test_a_case_that_fails_does_not_stop_the_others(gpu, monkeypatch, capsys):
    def fails(plan):
        yield {"speed": 1.0}
        raise ValueError("out of paper")

    def runs(plan):
        yield gpu.judged({"share": 0.7, "difference": 0.2}, "share >= 0.6", "difference <= 0.1")

    monkeypatch.setattr(gpu, "CASES", (fails, runs))
    first, second = gpu.measure(gpu.DRY)
    assert first["status"] == "failed: ValueError: out of paper" and first["rows"] == [{"speed": 1}]
    assert second["status"] == "ran" and second["rows"][0]["met"] is False
    assert "share >= 0.6, difference <= 0.1" in capsys.readouterr().out


def test_outcomes_of_tests_are_counted(gpu, tmp_path):
    lines = ["import pytest", "pytestmark = pytest.mark.cuda", "def test_passes(): pass"]
    lines += ["def test_fails(): assert False", "def test_skips(): pytest.skip('why')"]
    (tmp_path / "test_some.py").write_text("\n".join(lines))
    expected = {"passed": 1, "skipped": 1, "failed": 1, "failing": "test_fails"}
    assert gpu.outcomes([tmp_path / "test_some.py"]) == expected

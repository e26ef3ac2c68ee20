"""Extractions killed with SIGKILL at random rows and resumed: benchmarks/resume.py, short, and a
long one's record.
"""

import json
import os
import subprocess
import sys

import pytest

from companion import paths
from fungi_core import store


@pytest.mark.parametrize(
    "images, kills", [(700, 2), pytest.param(6000, 20, marks=pytest.mark.slow)]
)
def test_killed_and_resumed_is_byte_for_byte_the_undisturbed_one(images, kills, tmp_path):
    command = [sys.executable, "benchmarks/resume.py", "--images", str(images)]
    command += ["--kills", str(kills), "--out", str(tmp_path / "record.json")]
    command += ["--folder", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=paths.ROOT, env=environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "record.json").read_text())
    # The trunk, the embedding and the gradient.
    assert record["identical"] and record["files"] == 3 * -(-images // store.SHARD)
    assert record["computed_though_on_disk"] == record["temporary_files_left"] == 0
    assert 0 < record["kills"] <= kills
    assert (
        record["rows_lost_to_kills"] <= record["kills"] * 2 * store.SHARD
    )  # the torn shard, and a batch on its way


def test_the_committed_run_of_a_hundred_thousand_images():
    """What the committed record claims: nothing computed twice but torn shards, equal bytes, flat
    memory.
    """
    record = json.loads((paths.ROOT / "benchmarks" / "results" / "resume_cpu.json").read_text())
    assert record["images"] == 100_000 and record["kills"] >= 5
    assert (
        record["identical"]
        and record["computed_though_on_disk"] == record["temporary_files_left"] == 0
    )
    assert record["rows_lost_to_kills"] <= record["kills"] * 2 * store.SHARD
    tenths = record["peak_mib_by_tenth_of_the_undisturbed_run"]
    assert tenths[-1] <= 1.1 * tenths[1]

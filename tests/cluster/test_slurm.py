"""A real Slurm of one node, started and stopped here; minutes, so only with --slow."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import slurm

from companion import paths


@pytest.mark.slow
@pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing())
def test_a_batch_on_slurm_with_jobs_killed_draws_the_figures_of_a_local_one(tmp_path):
    """In shards; the killed jobs are run again. For the whole mini batch: `python
    tests/cluster/batch.py FOLDER`.
    """
    command = [sys.executable, str(Path(__file__).with_name("batch.py")), str(tmp_path), "--rows", "256",
               "--only", "15_pca", "17_throughput"]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(paths.ROOT)}
    done = subprocess.run(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(done.stdout)
    assert done.returncode == 0
    assert not slurm.pids(tmp_path), "daemons are still there"

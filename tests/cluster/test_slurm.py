"""A batch on a real Slurm of one node (minutes: only with --slow), and what checks it."""

import subprocess
import sys
import threading
from pathlib import Path

import batch
import pytest
import slurm


@pytest.mark.slow
@pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing())
def test_a_batch_on_slurm_with_jobs_killed_draws_the_figures_of_a_local_one(tmp_path):
    """In shards; the killed jobs are run again. ``batch.py FOLDER`` does it for the whole batch."""
    script = Path(__file__).with_name("batch.py")
    options = ["--rows", "256", "--only", "15_pca", "17_throughput"]
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0
    assert not slurm.pids(tmp_path), "daemons are still there"


def test_a_copy_of_the_project_finds_its_own_packages(tmp_path):
    env = batch.copy(tmp_path / "copy")
    code = "import fungi_core, companion; print(fungi_core.__file__, companion.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    found = [Path(file) for file in done.stdout.split()]
    own = tmp_path / "copy"
    assert found == [own / "fungi_core/__init__.py", own / "notebooks/companion/__init__.py"]
    assert not (own / "figures").exists()


def test_the_killer_waits_for_work_and_ends_one_job_of_each_kind(monkeypatch):
    """Without a Slurm: four jobs, of which the two that compute are ended, each once."""
    names = ["rule_notebook:a", "rule_features:b", "rule_notebook:c", "rule_features:d"]
    states = ["RUNNING", "PENDING", "RUNNING", "RUNNING"]
    jobs = [
        {"id": str(i), "name": name, "state": state}
        for i, (name, state) in enumerate(zip(names, states, strict=True))
    ]
    lines = {0: "python -m snakemake", 2: "python -m ipykernel_launcher", 3: batch.EXTRACTION}
    ended, log = [], []
    monkeypatch.setattr(slurm, "jobs", lambda env: jobs)
    monkeypatch.setattr(batch, "processes", lambda env, job: [int(job)])
    monkeypatch.setattr(batch, "command_line", lambda pid: lines.get(pid, ""))
    monkeypatch.setattr(batch, "end", lambda env, job, how: ended.append((job, how)))
    monkeypatch.setattr(batch.time, "sleep", lambda seconds: None)
    batch.kill_some({}, threading.Event(), log, shards=False)
    assert ended == [("2", "kill -9"), ("3", "scancel")]
    assert log == ["kill -9 2: rule_notebook:c", "scancel 3: rule_features:d"]
    again = [*jobs, {"id": "4", "name": "rule_notebook:c", "state": "COMPLETED"}]
    assert [batch.run_again(line, again) for line in log] == [True, False]


@pytest.mark.parametrize("change, same", [("", True), ("other", False), ("timed", True)])
def test_figures_are_compared_but_for_times(tmp_path, change, same):
    for place in ("local", "slurm"):
        folder = tmp_path / place / "figures" / "mini"
        folder.mkdir(parents=True)
        for name, slug in (("other", "15_pca"), ("timed", "17_throughput")):
            (folder / f"{name}.json").write_text(f'{{"notebook": "{slug}"}}')
            (folder / f"{name}.csv").write_text(place if name == change else "1")
    assert batch.same_figures(tmp_path / "local", tmp_path / "slurm") == same

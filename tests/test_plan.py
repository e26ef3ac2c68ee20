"""The plan of a batch: which jobs, how many shards, and what Snakemake makes of it."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from companion import paths, plan, run
from companion.plan import Job

DEIT = "vit_b_16.tv_in1k"


def job(
    backbone=DEIT,
    dataset="cifar10",
    n_train=0,
    n_test=0,
    group="embedding+kl+dino+simclr",
):
    return Job(backbone, dataset, n_train, n_test, 0, group)


def test_rows_are_the_official_sizes_of_both_splits_below_the_limits():
    assert job().rows == 50_000 + 10_000
    assert job(n_train=750).rows == 750 + 10_000
    assert job(n_train=750, n_test=20_000).rows == 750 + 10_000
    assert job(dataset="imagenet100").rows == 0  # not known
    assert job(dataset="my_own", n_train=40).rows == 0  # of the test split
    assert job(dataset="my_own", n_train=40, n_test=7).rows == 47


def test_shards_hold_a_fixed_number_of_rows():
    assert job(dataset="imagenet1k").shards() == 27  # 1,281,167 + 50,000 rows
    assert job().shards() == 2 and job(dataset="flowers102").shards() == 1
    assert job(dataset="imagenet100").shards() == 1  # size not known
    assert job(n_train=990, n_test=11).shards(500) == 3
    assert job(n_train=990, n_test=10).shards(500) == 2


def test_jobs_are_those_of_the_parameters():
    parameters = {"backbones": ["a", "b"], "datasets": ["x"], "n_train": 5, "n_test": 6, "seed": 1}
    found = plan.jobs(parameters, "mini", {"a", "x"})
    assert found == [Job("a", "x", 5, 6, 1, "embedding+kl+dino+simclr")]
    assert len(plan.jobs(parameters, "paper")) == 2 * 3
    others = plan.jobs(parameters | {"simclr_steps": 3}, "mini", {"a", "x"})
    assert {job.group for job in others} == {"embedding+kl+dino"}  # its SimCLR is its own
    sounds = plan.jobs(parameters | {"datasets": ["synthetic_sounds"], "backbones": ["a"]}, "mini")
    assert {job.group for job in sounds} == {"embedding+kl+simclr"}
    assert plan.jobs({"backbones": ["a"]}, "mini") == []


def test_a_job_whose_features_another_makes_is_that_job():
    job = lambda group, seed=0: plan.Job("net", "digits", 60, 40, seed, group)
    all_of, two = job("embedding+kl+dino+simclr"), job("embedding+kl+dino")
    elsewhere = job("embedding+kl", seed=1)
    wanted = {"02": [all_of], "07": [two], "08": [job("embedding+kl"), elsewhere], "13": []}
    found = plan.merged(wanted)
    assert found == {"02": [all_of], "07": [all_of], "08": [all_of, elsewhere], "13": []}


def test_the_listing_counts_jobs_shards_and_rows():
    same = [job(group="simclr"), job("vit_b_32.tv_in1k", group="simclr")]
    text = plan.listing(
        [*same, job(dataset="imagenet1k", group="dino"), job(dataset="imagenet100")]
    )
    lines = [line.split() for line in text.splitlines()]
    assert ["2", "4", "60000", "cifar10", "simclr"] in lines
    assert ["1", "27", "1331167", "imagenet1k", "dino"] in lines
    assert any(line[:5] == ["1", "1", "not", "known", "imagenet100"] for line in lines)
    assert lines[-1] == ["4", "32", "in", "all:", "1,451,167", "rows"]


def test_the_command_prints_a_profile_or_one_line(capsys):
    plan.main(["mini"])
    assert "features to extract for the profile mini:" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="plan: unknown profile 'huge'"):
        plan.main(["huge"])


# --- what Snakemake makes of it


@pytest.fixture
def snakemake(fresh_checkout):
    """Return a function that prints the plan of some targets, as in a fresh clone."""
    options = "-m snakemake --dry-run --forceall --nolock".split()

    def printed(*arguments: str, **env: str) -> str:
        command = [sys.executable, *options, *arguments]
        done = subprocess.run(
            command, cwd=fresh_checkout, env=os.environ | env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return printed


def counts(text: str) -> dict[str, int]:
    """Job stats: rule -> jobs."""
    return {
        rule: int(n)
        for rule, n in re.findall(r"^(shard|features|notebook|all) +(\d+)$", text, re.MULTILINE)
    }


@pytest.mark.batch
def test_shards_of_any_profile_by_config(snakemake):
    """Three data sets of 300 + 300 rows: two shards each."""
    target = "runs/mini/15_pca.ipynb"
    text = snakemake("--cores", "2", "--config", "profile=mini", "rows_a_job=500", "--", target)
    assert counts(text) == {"shard": 6, "features": 3, "notebook": 1}


@pytest.mark.batch
def test_the_papers_profile_asks_for_gpus_and_is_in_shards(snakemake, tmp_path):
    """With CIFAR 10 and DeiT "here": 60,000 rows, three jobs of features, in shards of 30,000."""
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "vit_b_16-c867db91.pth").touch()
    settings = ("--config", "profile=paper", "rows_a_job=30000")
    settings = ("--cores", "16", "--printshellcmds", *settings)
    target = "runs/paper/03_image_classification.ipynb"
    text = snakemake(*settings, "--", target, FUNGI_DATA=str(tmp_path))
    assert counts(text) == {"shard": 6, "features": 3, "notebook": 1}
    for i in (1, 2):
        sizes = "--n-train 0 --n-test 0 --seed 0"
        command = f"-m companion.features {DEIT} cifar10 simclr {sizes} --shard {i}/2"
        assert command in text
    resources = re.findall(r"resources: .*", text)
    wanted = ("gpu=1", "mem_mb=64000", "runtime=")
    assert sum(all(word in line for word in wanted) for line in resources) == 10
    assert text.count("threads: 8\n") == 10


@pytest.mark.batch
def test_a_folder_without_any_of_the_profiles_data_ends_the_batch(fresh_checkout, tmp_path):
    command = [sys.executable, *"-m snakemake --cores 1 --quiet all --nolock".split()]
    command += ["--config", "profile=lite"]
    env = os.environ | {"FUNGI_DATA": str(tmp_path)}
    done = subprocess.run(command, cwd=fresh_checkout, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "jobs done" not in done.stdout
    said = f"none of the data sets of lite is in {tmp_path}; it needs agnews, banking77, camvid"
    assert said in done.stdout + done.stderr


@pytest.mark.batch
def test_mini_asks_for_no_gpu(snakemake):
    text = snakemake("--cores", "2", "--config", "profile=mini", "--", "runs/mini/15_pca.ipynb")
    assert counts(text) == {"features": 3, "notebook": 1} and "gpu=1" not in text
    assert "threads:" not in text  # one each, which is not printed
    timed = snakemake(
        "--cores", "2", "--config", "profile=mini", "--", "runs/mini/17_throughput.ipynb"
    )
    assert "threads: 2\n" in timed


@pytest.mark.batch
def test_a_batch_runs_in_a_plain_copy_whose_path_has_a_space(tmp_path):
    """Its processes find both packages of the copy, not those that are installed."""
    copy = tmp_path / "my project"
    ignored = shutil.ignore_patterns("__pycache__", "*.ipynb")
    for name in ("fungi_core", "notebooks"):
        shutil.copytree(paths.ROOT / name, copy / name, ignore=ignored)
    for name in ("Snakefile", "requirements.lock"):
        shutil.copy(paths.ROOT / name, copy)
    (copy / "data").mkdir()
    for table in (paths.ROOT / "data").glob("*.csv"):
        shutil.copy(table, copy / "data")
    code = "import companion, fungi_core\nprint(companion.__file__, fungi_core.__file__, sep='\\n')"
    parameters = 'profile: str = "mini"  # which profile\nseed: int = 0  # base seed'
    tagged = new_code_cell(parameters, metadata={"tags": ["parameters"]})
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = new_notebook(cells=[tagged, new_code_cell(code)], metadata=kernel)
    nbformat.write(notebook, copy / "notebooks" / "01_method.ipynb")
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--quiet", "all", "--nolock"]
    done = subprocess.run(command, cwd=copy, env=bare, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^1 of 2 jobs done, about \d+\.\d minutes left$", done.stdout, re.MULTILINE)
    *_, cell = nbformat.read(copy / "runs" / "mini" / "01_method.ipynb", as_version=4).cells
    found = cell.outputs[0].text.split("\n")
    assert found[:2] == [
        str(copy / "notebooks" / "companion" / "__init__.py"),
        str(copy / "fungi_core" / "__init__.py"),
    ]


@pytest.mark.batch
@pytest.mark.skipif(
    not find_spec("snakemake_executor_plugin_slurm"), reason="needs the extra cluster"
)
def test_the_slurm_profile_is_accepted_and_is_no_profile_of_ours(snakemake):
    text = snakemake("--workflow-profile", "notebooks/profiles/slurm", "--config", "profile=mini")
    assert counts(text)["notebook"] == len(run.notebooks())
    assert "slurm" not in run.profiles()

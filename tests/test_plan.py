"""The plan of a batch: which jobs, how many shards, and hours worked out by hand."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pandas as pd
import pytest

from companion import paths, plan, run
from companion.plan import Job
from fungi_core.backbones import BACKBONES

DEIT = "vit_b_16.tv_in1k"


def job(
    backbone=DEIT,
    dataset="cifar10",
    split="train",
    n_train=0,
    n_test=0,
    group="embedding+kl+dino+simclr",
):
    return Job(backbone, dataset, split, n_train, n_test, 0, group)


def printed():
    """Speeds that make round numbers: 100, 10 and 5 images a second."""
    frame = pd.DataFrame({"K": [100.0], "D": [10.0], "S": [5.0]}, [DEIT])
    frame.attrs["basis"] = "hand"
    return frame


def test_images_are_the_official_sizes_below_the_limits():
    assert job().images == 50_000 and job(split="test").images == 10_000
    assert job(n_train=750).images == 750 and job(n_train=750, split="test").images == 10_000
    assert job(n_test=20_000, split="test").images == 10_000
    assert job(dataset="imagenet100").images == 0  # not known
    assert job(dataset="my_own").images == 0 and job(dataset="my_own", n_train=40).images == 40


def test_hours_worked_by_hand():
    """cifar10's 50,000 images: KL at 100/s 500 s, DINO at 10/s 5,000 s, SimCLR at 5/s 10,000 s."""
    groups = ("embedding+kl", "dino", "simclr", "embedding+kl+dino+simclr")
    table = plan.hours([job(group=group) for group in groups], printed())
    assert (table["hours"] * 3600).round(6).tolist() == [500, 5000, 10_000, 15_500]
    alone = plan.hours([job(group="embedding", n_train=900)], printed())["hours"]
    assert alone.item() == 9 / 3600  # no more than with KL
    unknown = [
        job(dataset="imagenet100"),
        job(next(n for n, s in BACKBONES.items() if s.modality != "image")),
    ]
    assert plan.hours(unknown, printed())["hours"].isna().all()


def test_a_backbone_that_was_not_measured_costs_parameters_times_tokens():
    """timm's ViT-B/16: 85,798,656 parameters without classifier, 14 x 14 patches and the class
    token; ViT-B/32: 50.
    """
    assert plan.cost(DEIT) == 85_798_656 * 197
    large, small = plan.cost("vit_base_patch16_224.mae"), plan.cost("vit_b_32.tv_in1k")
    assert large == plan.cost(DEIT) and small == 87_455_232 * 50
    hours = plan.hours([job(), job("vit_b_32.tv_in1k")], printed())["hours"]
    assert hours[1] / hours[0] == pytest.approx(87_455_232 * 50 / (85_798_656 * 197))


def test_the_nearest_measured_backbone_is_taken():
    frame = pd.DataFrame(
        {"K": [1.0, 1000.0], "D": [1.0, 1.0], "S": [1.0, 1.0]}, [DEIT, "vit_micro.sup_tin100"]
    )
    found = plan.hours(
        [job("vit_base_patch16_224.mae", n_train=3600, group="embedding+kl")], frame
    )["hours"]
    assert found.tolist() == [1.0]  # like DeiT's, of the same cost, not like the micro one's


def test_the_papers_profile_is_estimated_by_table_22_until_it_is_measured(tmp_path):
    speeds = plan.speeds("paper", tmp_path)
    assert (
        speeds.loc[DEIT, ["K", "D", "S"]].tolist() == [344, 32, 12]
        and "Table 22" in speeds.attrs["basis"]
    )
    assert plan.hours([job(n_train=344 * 36, group="embedding+kl")], speeds)[
        "hours"
    ].item() == pytest.approx(0.01)
    (tmp_path / "paper").mkdir()
    rows = [("K", 800.0, DEIT), ("D", 90.0, DEIT), ("S", 24.0, DEIT)]
    table = tmp_path / "paper" / "table22_throughput.csv"
    pd.DataFrame(rows, columns=["features", "value", "backbone"]).to_csv(table, index=False)
    table.with_suffix(".json").write_text(
        json.dumps({"device": {"cpu": "c", "cores": 16, "cuda": "NVIDIA H100"}})
    )
    speeds = plan.speeds("paper", tmp_path)
    assert speeds.loc[DEIT, "S"] == 24 and speeds.attrs["basis"].startswith(
        "17_throughput on NVIDIA H100 (paper/"
    )


def test_lite_is_estimated_by_the_committed_figures():
    speeds = plan.speeds("lite")
    assert "vit_mini.sup_tin100" in speeds.index and speeds.attrs["basis"].startswith(
        "17_throughput on "
    )


def test_shards_of_the_papers_profile_take_about_an_hour_each():
    sizes = plan.groups("paper")
    assert sizes == {
        "embedding+kl": 1_239_000,
        "dino": 116_000,
        "simclr": 44_000,
    }  # 344, 32, 12 images/s x 3600 s
    assert (
        plan.shards(job(dataset="imagenet1k", group="simclr"), sizes["simclr"]) == 30
    )  # 1,281,167 rows
    assert plan.shards(job(dataset="flowers102"), sizes["simclr"]) == 1  # 1,020 rows
    assert plan.shards(job(dataset="imagenet100"), sizes["simclr"]) == 1  # size not known
    assert plan.shards(job(n_train=1001), 500) == 3 and plan.shards(job(), 0) == 1
    assert plan.groups("mini") == {"embedding+kl+dino+simclr": 0}


def test_jobs_are_those_of_the_parameters():
    parameters = {"backbones": ["a", "b"], "datasets": ["x"], "n_train": 5, "n_test": 6, "seed": 1}
    found = plan.jobs(parameters, "mini", {"a", "x"})
    assert found == [
        Job("a", "x", split, 5, 6, 1, "embedding+kl+dino+simclr") for split in ("train", "test")
    ]
    assert len(plan.jobs(parameters, "paper")) == 2 * 2 * 3
    sounds = plan.jobs(parameters | {"datasets": ["synthetic_sounds"], "backbones": ["a"]}, "mini")
    assert {job.group for job in sounds} == {"embedding+kl+simclr"}
    assert plan.jobs({"backbones": ["a"]}, "mini") == []


def test_the_summary_says_what_it_is_based_on(monkeypatch):
    monkeypatch.setattr(plan, "speeds", lambda *_a, **_k: printed())
    text = plan.summary([job(group="embedding+kl"), job(dataset="imagenet100", group="embedding+kl")], "paper",
                        {"embedding+kl": 10_000})  # fmt: skip
    assert "hours of one device, by hand" in text and "Not in it: decoding, queues" in text
    assert f"No hours known, counted as none: imagenet100 with {DEIT}" in text
    assert text.splitlines()[3].split() == [
        "embedding+kl",
        "6",
        "50,000",
        "0.14",
    ]  # 5 shards and 1; 500 s
    assert "no features to extract" in plan.summary([], "mini")


def test_the_command_prints_a_profile_or_one_line(capsys):
    plan.main(["mini"])
    assert "profile mini, features to extract:" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="plan: unknown profile 'huge'"):
        plan.main(["huge"])


# --- what Snakemake makes of it


def snakemake(*arguments: str, **env: str) -> str:
    command = [sys.executable, "-m", "snakemake", "--dry-run", "--forceall", "--nolock", *arguments]
    done = subprocess.run(
        command, cwd=paths.ROOT, env=os.environ | env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def counts(text: str) -> dict[str, int]:
    """Job stats: rule -> jobs."""
    return {
        rule: int(n)
        for rule, n in re.findall(r"^(shard|features|notebook|all) +(\d+)$", text, re.MULTILINE)
    }


def test_shards_of_any_profile_by_config():
    text = snakemake(
        "--cores", "2", "--config", "profile=mini", "rows_a_job=256", "--", "runs/mini/15_pca.ipynb"
    )
    assert counts(text) == {
        "shard": 12,
        "features": 6,
        "notebook": 1,
    }  # 6 splits of up to 500 rows: two shards each
    assert "profile mini, features to extract:" in text and "hours of one device" in text


def test_the_papers_profile_asks_for_gpus_and_is_in_shards(tmp_path):
    """With CIFAR 10 and DeiT "here": 10,000 and 50,000 rows, of which SimCLR's are two shards; all
    else is one job.
    """
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "vit_b_16-c867db91.pth").touch()
    text = snakemake("--cores", "16", "--printshellcmds", "--config", "profile=paper", "--",
                     "runs/paper/03_image_classification.ipynb", FUNGI_DATA=str(tmp_path))  # fmt: skip
    assert counts(text) == {"shard": 2, "features": 6, "notebook": 1}
    for i in (1, 2):
        assert f"{DEIT} cifar10 train simclr --n-train 0 --n-test 0 --seed 0 --shard {i}/2" in text
    resources = re.findall(r"resources: .*", text)
    asked = [
        line
        for line in resources
        if "gpu=1" in line and "mem_mb=64000" in line and "runtime=" in line
    ]
    assert len(asked) == 9


def test_mini_asks_for_no_gpu():
    text = snakemake("--cores", "2", "--config", "profile=mini", "--", "runs/mini/15_pca.ipynb")
    assert counts(text) == {"features": 6, "notebook": 1} and "gpu=1" not in text


@pytest.mark.skipif(
    not find_spec("snakemake_executor_plugin_slurm"), reason="needs the extra cluster"
)
def test_the_slurm_profile_is_accepted_and_is_no_profile_of_ours():
    text = snakemake("--workflow-profile", "notebooks/profiles/slurm", "--config", "profile=mini")
    assert counts(text)["notebook"] == len(run.notebooks())
    assert "slurm" not in run.profiles()

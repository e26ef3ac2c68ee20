"""What a batch extracts before its notebooks run: the jobs, their shards, and hours estimated from
measured speeds.

python -m companion.plan paper      # the whole profile, whatever of it is on this machine
"""

import json
import math
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import timm
import torch

from companion import paper, paths, run
from companion.data import datasets
from fungi_core import backbones
from fungi_core.extract import LETTERS

MINUTES_A_JOB = (
    60  # of one A100 and a ViT-B/16, by Table 22: what a shard of the paper profile is made for
)


class Job(NamedTuple):
    """Features of one split: ``group`` joins their names by "+"; the sizes are limits, 0 for the
    whole split.
    """

    backbone: str
    dataset: str
    split: str
    n_train: int
    n_test: int
    seed: int
    group: str

    @property
    def images(self) -> int:
        """Rows of the split; 0 where the official size is not known."""
        entry, limit = (
            datasets.DATASETS.get(self.dataset),
            self.n_train if self.split == "train" else self.n_test,
        )
        official = (entry and (entry.n_train if self.split == "train" else entry.n_test)) or 0
        return min(limit, official) if limit and official else limit or official


def groups(profile: str, kind: str = "image") -> dict[str, int]:
    """Features that one job extracts -> rows of one of its shards; 0: never in shards.

    A job starts Python and torch, which takes seconds: as long as the mini extraction itself. So
    one job makes all four features, but in the paper profile, where they take hours, each is a job,
    or several jobs that write different rows. The embedding comes with the KL gradient for nothing.
    ``kind``: text and audio have no DINO (Tables 12, 19).
    """
    names = ["embedding+kl", *(["dino"] if kind == "image" else []), "simclr"]
    if profile != "paper":
        return {"+".join(names): 0}
    speed = speeds("paper", folder=Path("none")).loc[
        "vit_b_16.tv_in1k"
    ]  # printed ones: fixed shards
    rows = {name: 60 * MINUTES_A_JOB * speed[LETTERS[name.split("+")[-1]]] for name in names}
    return {name: 1000 * math.ceil(number / 1000) for name, number in rows.items()}


def jobs(parameters: dict, profile: str, present: Iterable[str] | None = None) -> list[Job]:
    """What a notebook with these parameters reads: backbones x data sets x splits x groups, where
    it declares them and their sizes. ``present``: only these backbones and data sets.
    """
    if not {"backbones", "datasets", "n_train", "n_test", "seed"} <= parameters.keys():
        return []
    here = lambda name: present is None or name in present
    sizes = parameters["n_train"], parameters["n_test"], parameters["seed"]
    return [
        Job(backbone, dataset, split, *sizes, group)
        for backbone in parameters["backbones"]
        if here(backbone)
        for dataset in parameters["datasets"]
        if here(dataset)
        for split in ("train", "test")
        for group in groups(profile, modality(dataset))
    ]


def modality(dataset: str) -> str:
    """Of a data set of the table; a packed file without an entry holds images."""
    return datasets.DATASETS[dataset].modality if dataset in datasets.DATASETS else "image"


def shards(job: Job, rows: int) -> int:
    """Number of jobs that fill this one's rows, ``rows`` each at most; 1 where ``rows`` is 0."""
    return max(1, math.ceil(job.images / rows)) if rows else 1


@cache
def cost(backbone: str) -> float:
    """Multiplications of one forward pass, roughly: parameters x tokens. NaN for networks without
    image patches.
    """
    spec = backbones.spec_of(backbone)
    mini = backbones.MINI.get(backbone.split(".")[0])
    if spec and spec.modality != "image":
        return math.nan
    with torch.device("meta"):  # shapes without numbers
        if mini:
            model = backbones.VisionTransformer(**mini, num_classes=0)
        else:
            name = backbone.removeprefix("random:")
            model = backbones.skeleton(spec) if spec else timm.create_model(name, num_classes=0)
    tokens = model.patch_embed.num_patches + 1 if hasattr(model, "patch_embed") else math.nan
    return float(sum(p.numel() for p in model.parameters()) * tokens)


def speeds(profile: str, folder: Path | None = None) -> pd.DataFrame:
    """Images/s by backbone and feature letter (K with the embedding, D, S), as `17_throughput`
    measured them in this profile, else in the committed lite figures; for the paper profile else as
    Table 22 prints them. ``attrs["basis"]`` says which. ``folder``: of all figures; default
    `paths.figures_dir`.
    """
    files = [(folder or paths.figures_dir()) / profile / "table22_throughput.csv"]
    if profile != "paper":  # two cores are no measure for a GPU
        files.append(paths.ROOT / "figures" / "lite" / "table22_throughput.csv")
    for file in files:
        if file.is_file():
            device = json.loads(file.with_suffix(".json").read_text())["device"]
            found = pd.read_csv(file).pivot(index="backbone", columns="features", values="value")
            where = device["cuda"] or f"{device['cpu']}, {device['cores']} cores"
            found.attrs["basis"] = f"17_throughput on {where} ({file.parent.name}/{file.name})"
            return found
    printed = paper.load(22).query("metric == 'images/s'").set_index("row")["value"]
    found = pd.DataFrame(
        {LETTERS[n.lower()]: [printed[n]] for n in ("KL", "DINO", "SimCLR")}, ["vit_b_16.tv_in1k"]
    )
    found.attrs["basis"] = "the paper's Table 22 (A100, ViT-B/16)"
    return found


def hours(todo: Sequence[Job], measured: pd.DataFrame) -> pd.DataFrame:
    """One row a job: its fields, images, hours on the machine of ``measured`` (see `speeds`).

    A backbone that was not measured takes the speed of the nearest one that was, divided by the
    ratio of their `cost`. NaN where size or cost is not known.
    """
    rows = []
    for job in todo:
        if (like := job.backbone) not in measured.index and not math.isnan(cost(job.backbone)):
            distance = {
                name: abs(math.log(cost(name) / cost(job.backbone))) for name in measured.index
            }
            like = min(distance, key=distance.get)
        letters = {LETTERS[name] for name in job.group.split("+")} - {"E"} or {
            "K"
        }  # E alone: no more than with K
        if like not in measured.index or not job.images:
            rows.append((*job, job.images, math.nan))
            continue
        slower = 1 if like == job.backbone else cost(job.backbone) / cost(like)
        seconds = sum(job.images * slower / measured.loc[like, letter] for letter in letters)
        rows.append((*job, job.images, seconds / 3600))
    return pd.DataFrame(rows, columns=[*Job._fields, "images", "hours"])


def summary(todo: Sequence[Job], profile: str, rows: dict[str, int] | None = None) -> str:
    """The estimate in a few lines: jobs, images and hours by group, and what it is based on.
    ``rows`` of a shard by group, as `groups` gives them.
    """
    if not todo:
        return f"profile {profile}: no features to extract; either all is there, or none of its data or backbones is"
    measured, rows = speeds(profile), rows or groups(profile) | groups(profile, "audio")
    table = hours(todo, measured)
    table["jobs"] = [shards(job, rows[job.group]) for job in todo]
    sums = table.groupby("group", sort=False)[["jobs", "images", "hours"]].sum()
    sums.loc["all"] = sums.sum()
    lines = sums.to_string(
        formatters={"jobs": "{:.0f}".format, "images": "{:,.0f}".format, "hours": "{:.2f}".format}
    )
    unknown = table[table["hours"].isna()]
    unknown = sorted({f"{row.dataset} with {row.backbone}" for row in unknown.itertuples()})
    return "\n".join(
        [
            f"profile {profile}, features to extract:",
            lines,
            f"hours of one device, by {measured.attrs['basis']}; other backbones by parameters x tokens.",
            "Not in it: decoding, queues, start of the jobs, what notebooks extract themselves, and evaluation.",
            *([f"No hours known, counted as none: {', '.join(unknown)}"] if unknown else []),
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    profile = (argv if argv is not None else sys.argv[1:] or ["mini"])[0]
    try:
        wanted = {
            job for slug in run.notebooks() for job in jobs(run.parameters(slug, profile), profile)
        }
    except ValueError as error:
        sys.exit(f"plan: {error}")
    print(summary(sorted(wanted), profile))


if __name__ == "__main__":
    main()

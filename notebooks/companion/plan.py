"""What a batch extracts before its notebooks run: the jobs, and the shards that they are cut into.

python -m companion.plan paper      # jobs and rows of a whole profile, on this machine or not
"""

import math
import sys
from collections import defaultdict
from collections.abc import Collection
from typing import NamedTuple

from companion import run
from companion.data import datasets

ROWS = 50_000  # of a shard: about an hour of SimCLR on one A100 with a ViT-B/16, by Table 22


class Job(NamedTuple):
    """Features of both splits; ``group``: names joined by "+"; a size of 0 is the whole split."""

    backbone: str
    dataset: str
    n_train: int
    n_test: int
    seed: int
    group: str

    @property
    def rows(self) -> int:
        """Return the number of rows, 0 where a split's official size is not known."""
        entry = datasets.DATASETS.get(self.dataset)
        official = (entry.n_train, entry.n_test) if entry else (0, 0)
        pairs = zip((self.n_train, self.n_test), official, strict=True)
        sizes = [min(filter(None, pair), default=0) for pair in pairs]
        return sum(sizes) if all(sizes) else 0

    def shards(self, rows: int = ROWS) -> int:
        """Return how many jobs fill this one's rows, ``rows`` each at most."""
        return max(1, math.ceil(self.rows / rows))


def groups(profile: str, dataset: str, parameters: Collection[str]) -> list[str]:
    """Return the groups of features of a data set that a notebook reads; each is a job.

    A job starts Python and torch, which takes seconds: as long as the mini extraction itself. So
    one job makes all features, but in the paper profile, where they take hours, each gradient has
    its own. The embedding comes with the KL gradient for nothing. Text and audio have no DINO
    (Tables 12, 19); a data set without an entry in the table holds images. A notebook whose
    ``parameters`` hold ``simclr_steps`` extracts SimCLR itself, with its own number of views.
    """
    entry = datasets.DATASETS.get(dataset)
    image = entry is None or entry.modality == "image"
    names = ["embedding+kl"] + ["dino"] * image + ["simclr"] * ("simclr_steps" not in parameters)
    return names if profile == "paper" else ["+".join(names)]


def jobs(parameters: dict, profile: str, present: Collection[str] | None = None) -> list[Job]:
    """Return what a notebook with these parameters reads: backbones x data sets x seeds x groups,
    where it declares them and their sizes. ``present``: only these backbones and data sets.
    """
    if not {"backbones", "datasets", "n_train", "n_test", "seed"} <= parameters.keys():
        return []
    backbones, sets = (
        [name for name in parameters[kind] if present is None or name in present]
        for kind in ("backbones", "datasets")
    )
    sizes = [parameters[name] for name in ("n_train", "n_test")]
    seeds = range(parameters["seed"], parameters["seed"] + parameters.get("seeds", 1))
    return [
        Job(backbone, dataset, *sizes, seed, group)
        for backbone in backbones
        for dataset in sets
        for seed in seeds
        for group in groups(profile, dataset, parameters)
    ]


def merged(wanted: dict[str, list[Job]]) -> dict[str, list[Job]]:
    """Return each notebook's jobs; one whose features another makes as well becomes that one."""
    names, same = lambda job: set(job.group.split("+")), defaultdict(set)
    for job in set().union(*wanted.values()):
        same[job[:-1]].add(job)  # of the same rows

    def widest(job: Job) -> Job:
        makers = [one for one in same[job[:-1]] if names(job) <= names(one)]
        return max(makers, key=lambda one: len(names(one)))

    return {slug: list(dict.fromkeys(map(widest, own))) for slug, own in wanted.items()}


def listing(todo: Collection[Job]) -> str:
    """Return jobs as text: how many of each data set and features, their rows and shards."""
    same = defaultdict(list)
    for job in sorted(todo):
        same[f"{job.dataset:24} {job.group}", job.rows].append(job)
    lines = [f"{'jobs':>6} {'shards':>6} {'rows each':>10}  data set"]
    for (name, rows), found in sorted(same.items()):
        shards = sum(job.shards() for job in found)
        lines.append(f"{len(found):6} {shards:6} {rows or 'not known':>10}  {name}")
    shards, rows = sum(job.shards() for job in todo), sum(job.rows for job in todo)
    return "\n".join([*lines, f"{len(todo):6} {shards:6}  in all: {rows:,} rows"])


def main(argv: list[str] | None = None) -> None:
    """Print the jobs of a profile."""
    profile = (argv if argv is not None else sys.argv[1:] or ["mini"])[0]
    try:
        wanted = {slug: jobs(run.parameters(slug, profile), profile) for slug in run.notebooks()}
    except ValueError as error:
        sys.exit(f"plan: {error}")
    print(f"features to extract for the profile {profile}:")
    print(listing(set().union(*merged(wanted).values())))


if __name__ == "__main__":
    main()

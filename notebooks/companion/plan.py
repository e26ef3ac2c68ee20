"""What a batch extracts before its notebooks run: the jobs, their shards and their rows.

python -m companion.plan paper      # the whole profile, whatever of it is on this machine
"""

import math
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import pandas as pd

from companion import run
from companion.data import datasets

ROWS_A_SHARD = {"embedding+kl": 400_000, "dino": 40_000, "simclr": 10_000}  # of the paper profile


class Job(NamedTuple):
    """Name the features of one split that one job extracts.

    ``group`` joins their names by "+"; the sizes are limits, 0 for the whole split.
    """

    backbone: str
    dataset: str
    split: str
    n_train: int
    n_test: int
    seed: int
    group: str

    @property
    def rows(self) -> int:
        """Return the rows of the split, 0 where its official size is not known."""
        entry = datasets.DATASETS.get(self.dataset)
        train = self.split == "train"
        limit = self.n_train if train else self.n_test
        official = (entry and (entry.n_train if train else entry.n_test)) or 0
        return min(limit, official) if limit and official else limit or official


def groups(profile: str, kind: str = "image") -> dict[str, int]:
    """Return the features that one job extracts, and the rows of one of its shards (0: no shards).

    A job starts Python and torch, which takes as long as a mini extraction. So one job makes all four
    features; in the paper profile, where they take hours, each is a job, or several jobs that write
    different rows. The embedding comes with the KL gradient. Texts and sounds have no DINO.
    """
    found = dict(ROWS_A_SHARD)
    if kind != "image":
        del found["dino"]
    return found if profile == "paper" else {"+".join(found): 0}


def jobs(parameters: dict, profile: str, present: Iterable[str] | None = None) -> list[Job]:
    """Return what a notebook with these parameters reads: backbones x data sets x splits x groups.

    Notebooks that declare none of them read nothing. ``present``: only these backbones and data sets.
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
    """Return what a data set holds; one that is not in the table holds images."""
    return datasets.DATASETS[dataset].modality if dataset in datasets.DATASETS else "image"


def shards(job: Job, rows: int) -> int:
    """Return the number of jobs that fill this one's rows, ``rows`` each at most; 1 for 0 rows."""
    return max(1, math.ceil(job.rows / rows)) if rows else 1


def summary(todo: Sequence[Job], profile: str, rows: dict[str, int] | None = None) -> str:
    """Return jobs and rows by group, as lines of text; ``rows``: of a shard by group."""
    if not todo:
        return (
            f"profile {profile}: no features to extract; either all is there, or none of its data "
            "or backbones is"
        )
    rows = rows or groups(profile) | groups(profile, "audio")
    table = pd.DataFrame(todo)
    table["jobs"] = [shards(job, rows[job.group]) for job in todo]
    table["rows"] = [job.rows for job in todo]
    sums = table.groupby("group", sort=False)[["jobs", "rows"]].sum()
    sums.loc["all"] = sums.sum()
    lines = [f"profile {profile}, features to extract:", sums.to_string()]
    if unknown := sorted({job.dataset for job in todo if not job.rows}):
        lines.append(f"Rows not known, counted as none: {', '.join(unknown)}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    profile = (argv if argv is not None else sys.argv[1:] or ["mini"])[0]
    try:
        parameters = [run.parameters(slug, profile) for slug in run.notebooks()]
    except ValueError as error:
        sys.exit(f"plan: {error}")
    print(summary(sorted({job for one in parameters for job in jobs(one, profile)}), profile))


if __name__ == "__main__":
    main()

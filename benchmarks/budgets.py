"""What a reader and a developer wait for, against the budgets of CONTRIBUTING.md.

    python benchmarks/budgets.py [--repeats 3] [--only NAME ...] [--out FILE]

Times whole commands in this checkout, installed and on an otherwise idle machine: wall-clock
seconds, the median of the repeats and all of them. Budgets are for two quiet cores. Features and
figures go to build/budgets; what lies in runs/mini is lost. A command that fails ends it.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from companion import run
from companion.paths import ROOT
from companion.provenance import cpu

SCRATCH, RUNS = ROOT / "build" / "budgets", ROOT / "runs" / "mini"
SECONDS = {
    "reproduce, cold": 480,
    "reproduce, features stored": 120,
    "reproduce, nothing to do": 6,
    "test": 900,
    "first picture of 00_start_here": 10,
    "first picture of 01_method": 30,
    "slowest explore cell": 2,
}


def make(target: str, *gone: Path) -> float:
    """Return the seconds of a make target, after the folders ``gone`` were removed."""
    for folder in gone:
        shutil.rmtree(folder, ignore_errors=True)
    start = time.perf_counter()
    subprocess.run(["make", target], cwd=ROOT, check=True, stdout=sys.stderr)
    return time.perf_counter() - start


def executed(slug: str) -> list:
    """Return the code cells of a notebook, run as a reader runs it, each with its times."""
    notebook = nbformat.read(run.NOTEBOOKS / f"{slug}.ipynb", as_version=4)
    where = {"metadata": {"path": str(run.NOTEBOOKS)}}
    start = datetime.now().astimezone()
    NotebookClient(notebook, timeout=None, resources=where, kernel_name="python3").execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in cells:
        times = cell.metadata.execution
        begun, done = (
            datetime.fromisoformat(times[f"iopub.{name}"])
            for name in ("execute_input", "status.idle")
        )
        cell.took, cell.at = (done - begun).total_seconds(), (done - start).total_seconds()
    return cells


def first_picture(slug: str) -> float:
    """Return the seconds from the start of the kernel to the first picture of a notebook."""
    pictures = lambda cell: any("image/png" in out.get("data", {}) for out in cell.outputs)
    return next(cell.at for cell in executed(slug) if pictures(cell))


def slowest_explore_cell() -> float:
    """Return the longest run of a cell that draws again when a slider moves, features stored."""
    cells = [cell for slug in run.notebooks() for cell in executed(slug)]
    return max(cell.took for cell in cells if "explore.interact(" in cell.source)


# In an order in which each finds what it needs.
MEASURES: dict[str, Callable[[], float]] = {
    "reproduce, cold": partial(make, "reproduce", RUNS, SCRATCH),
    "reproduce, features stored": partial(make, "reproduce", RUNS),
    "reproduce, nothing to do": partial(make, "reproduce"),
    "test": partial(make, "test"),
    "first picture of 00_start_here": partial(first_picture, "00_start_here"),
    "first picture of 01_method": partial(first_picture, "01_method"),
    "slowest explore cell": slowest_explore_cell,
}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=SECONDS, default=list(SECONDS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    os.environ |= {"FUNGI_STORE": str(SCRATCH / "store"), "FUNGI_FIGURES": str(SCRATCH / "figures")}
    make("install")
    found = {name: [] for name in SECONDS if name in args.only}
    for _ in range(args.repeats):
        for name in found:
            found[name].append(round(MEASURES[name](), 1))
    for name, seconds in found.items():
        median = statistics.median(seconds)
        word = "within" if median <= SECONDS[name] else "over"
        print(f"{name:32} {median:7.1f} s, {word} {SECONDS[name]} s  {seconds}")
    if args.out:
        args.out.write_text(json.dumps({"cpu": cpu(), "seconds": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()

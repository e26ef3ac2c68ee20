"""Seconds of importing all that `fungi_core.load` needs against `import torch, timm`: medians and
their ratio.

    python benchmarks/imports.py [--repeats 9]

Each import is a process of its own; the two take turns, so that drift of the machine hits both.
What the project promises is a ratio below 1.2.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMPORTS = OTHERS, OURS = "torch, timm", "fungi_core.backbones, fungi_core.objectives"


def seconds(names: str) -> float:
    """Return the wall-clock seconds of a process that imports and ends."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {names}"], cwd=ROOT, check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    rounds = [[seconds(names) for names in IMPORTS] for _ in range(repeats + 1)]
    times = dict(zip(IMPORTS, zip(*rounds[1:])))  # the first round fills the file cache
    medians = {names: statistics.median(times[names]) for names in IMPORTS}
    for names in IMPORTS:
        low, high = min(times[names]), max(times[names])
        print(f"import {names}: {medians[names]:.2f} s ({low:.2f} to {high:.2f})")
    print(f"ratio of medians: {medians[OURS] / medians[OTHERS]:.2f}")


if __name__ == "__main__":
    main()

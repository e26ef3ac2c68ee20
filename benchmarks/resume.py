"""Kill an extraction with SIGKILL at random rows, again and again; compare with an undisturbed one.

    python benchmarks/resume.py [--images 100000] [--kills 10] [--seed 0] [--folder DIR] [--out F]

Compared are bytes, rows and memory. Each attempt is a process of its own that extracts embeddings
and KL gradients of small drawn images (the network is made for 32 px: the store is what is tried)
and logs the rows that it hands to the store. It is killed when it has computed a number of rows
drawn by the seed; the last one runs to its end. Exit status 1 where anything but a torn file was
computed twice, or a byte differs. The gradient and the embedding come from one pass and appear one
after the other: a kill between them tears both.
"""

import argparse
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import timm
import torch
from tqdm.auto import tqdm

from companion.provenance import cpu
from fungi_core import KL, load, store
from fungi_core.extract import fill
from fungi_core.seeds import generator

SIDE = 32
Log = list[tuple[str, int, int, int]]  # (key, first row, rows, resident bytes) of each block


class Drawn:
    """A data set of different images: two colours and a slanted edge, drawn by their number."""

    name, split = "drawn", "train"

    def __init__(self, count: int):
        self.count, self.fingerprint = count, str(count)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> np.ndarray:
        rng = generator("resume", i)
        y, x = np.mgrid[:SIDE, :SIDE]
        slope, colours = rng.uniform(-2, 2), rng.integers(0, 256, (2, 3), dtype=np.uint8)
        side = (y - SIDE / 2 > slope * (x - SIDE * rng.random())).astype(int)
        return colours[side]  # (SIDE, SIDE, 3)


def extract(root: Path, count: int) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=0, img_size=SIDE)
    layer = f"blocks.{len(model.blocks) - 1}.attn.proj"
    backbone = load(model, layer=layer, device="cpu", dtype="float32")
    fill(Drawn(count), backbone, [KL()], root=root)


def memory() -> int:
    """Return the bytes resident now."""
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def logged(root: Path, count: int, log: Path) -> None:
    """Extract, and log each block that the store is given."""
    real = store.Entry.write
    with log.open("a", buffering=1) as file:

        def write(self, start, block):
            file.write(f"{self.key} {start} {len(block)} {memory()}\n")
            return real(self, start, block)

        store.Entry.write = write
        extract(root, count)


def attempt(root: Path, log: Path, count: int, rows: int | None) -> tuple[int, Log]:
    """Extract in a forked process, killed once it has computed ``rows`` rows (None: not killed).

    Returns its exit status and what it logged.
    """
    log.write_bytes(b"")
    child = os.fork()
    if child == 0:
        try:
            logged(root, count, log)
            os._exit(0)
        except BaseException as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        lines = log.read_text().splitlines()
        if ended:
            return os.waitstatus_to_exitcode(status), parsed(lines)
        blocks = parsed(lines[:-1])  # the last line may be in the writing
        if rows is not None and sum(length for _, _, length, _ in blocks) >= max(1, rows):
            os.kill(child, signal.SIGKILL)
            rows = None
        time.sleep(0.02)


def parsed(lines: list[str]) -> Log:
    return [(key, *map(int, numbers)) for key, *numbers in map(str.split, lines)]


def on_disk(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*.npy"))}


def complete(root: Path, count: int) -> dict[str, np.ndarray]:
    """Return which rows need not be computed again by the files' names, {key: (count,) bool}.

    A row of the gradient or of the embedding counts once both are on disk: one pass gives both.
    """
    out = defaultdict(lambda: np.zeros(count, bool))
    for file in root.glob("*/*.npy"):
        out[file.parent.name][int(file.name[:9]) :][: store.SHARD] = True
    metas = {file.parent.name: json.loads(file.read_bytes()) for file in root.glob("*/meta.json")}
    pair = [key for key, meta in metas.items() if meta["meta"]["feature"] != "trunk"]
    both = np.logical_and.reduce([out[key] for key in pair]) & (len(pair) == 2)
    return out | dict.fromkeys(pair, both)


def mib(blocks: Log) -> float | None:
    return round(max(resident for *_, resident in blocks) / 2**20, 1) if blocks else None


def disturbed(root: Path, log: Path, count: int, kills: int, seed: int) -> dict:
    """Extract with ``kills`` kills on the way; return what it cost."""
    rng, start = generator("kills", seed), time.perf_counter()
    attempts, lost, again = [], 0, 0
    for i in tqdm(range(kills + 1), "attempts", disable=not sys.stderr.isatty()):
        had = complete(root, count)
        # Three entries: trunk, embedding and gradient.
        rows = None if i == kills else int(rng.uniform(0, 1.6 * 3 * count / (kills + 1)))
        status, blocks = attempt(root, log, count, rows)
        if status not in (0, -signal.SIGKILL):
            raise RuntimeError(f"attempt {i} ended with status {status}")
        has = complete(root, count)
        for key, first, length, _ in blocks:
            part = slice(first, first + length)
            again += int(had[key][part].sum())  # was on disk already: must not happen
            lost += int((~has[key][part]).sum())  # the kill took it
        attempts.append({"killed_after": rows, "status": status, "peak_mib": mib(blocks)})
    return {
        "kills": sum(one["status"] == -signal.SIGKILL for one in attempts),
        "computed_though_on_disk": again,
        "rows_lost_to_kills": lost,
        "seconds_killed_run": round(time.perf_counter() - start, 1),
        "attempts": attempts,
    }


def measure(folder: Path, count: int, kills: int, seed: int) -> dict:
    root, log = folder / "killed", folder / "log"
    cost = disturbed(root, log, count, kills, seed)
    status, blocks = attempt(folder / "undisturbed", log, count, None)
    files, expected = on_disk(root), on_disk(folder / "undisturbed")
    tenths = [blocks[: max(1, share * len(blocks) // 10)] for share in range(1, 11)]
    return {
        "machine": {"processor": cpu(), "cores": os.cpu_count()},
        "images": count,
        "shard_rows": store.SHARD,
        "identical": status == 0 and len(expected) > 0 and files == expected,
        "files": len(files),
        "temporary_files_left": len(list(root.rglob("*.tmp"))),
        "peak_mib_by_tenth_of_the_undisturbed_run": [mib(part) for part in tenths],
    } | cost


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where stores go (default: a temporary one)")
    default = Path(__file__).parent / "results" / "resume_cpu.json"
    parser.add_argument("--out", type=Path, default=default, help=f"default: {default.name}")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        record = measure(Path(scratch), args.images, args.kills, args.seed)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    return 0 if record["identical"] and record["computed_though_on_disk"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())

"""An extraction killed with SIGKILL at random rows, again and again, against an undisturbed one:
bytes, rows, memory.

    python benchmarks/resume.py [--images 100000] [--kills 10] [--seed 0] [--folder DIR] [--out FILE.json]

Each attempt is a process of its own that runs `python -m fungi_core.extract random:test_vit many
train kl` on a packed file of small images (the network is made for 32 px: the store is what is
tried) and logs the rows that it hands to the store. It is killed when it has computed a number of
rows drawn by the seed; the last one runs to its end. Exit status 1 where anything but a torn shard
was computed twice, or a byte differs.
"""

import argparse
import io
import json
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from tqdm.auto import tqdm

from companion import pack
from companion.data.images import Split
from companion.figures import style as figures
from fungi_core import backbones, extract, store, views

SIDE, NAME = 32, "many"
COMMAND = ["random:test_vit", NAME, "train", "kl"]


def tiny(name: str, spec) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model(name.removeprefix("random:"), num_classes=0, img_size=SIDE)


def make(file: Path, count: int) -> None:
    """``count`` different images of SIDE px as a packed file: two colours and a slanted edge, drawn
    by their number.
    """

    def png(i: int) -> bytes:
        rng = views.generator("resume", i)
        y, x = np.mgrid[:SIDE, :SIDE]
        slope, colours = rng.uniform(-2, 2), rng.integers(0, 256, (2, 3), dtype=np.uint8)
        side = (y - SIDE / 2 > slope * (x - SIDE * rng.random())).astype(int)
        Image.fromarray(colours[side]).save(out := io.BytesIO(), "PNG")
        return out.getvalue()

    class Drawn:  # made one at a time while they are packed
        def __iter__(self):
            return (png(i) for i in tqdm(range(count), "images", disable=not sys.stderr.isatty()))

    names = [f"{i:06d}" for i in range(count)]
    pack.write(
        file,
        Split(Drawn(), np.arange(count) % 10, names, list("0123456789")),
        Split([png(count)], np.zeros(1, int), ["test"], list("0123456789")),
    )


def memory() -> int:
    """Bytes resident now."""
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def attempt(root: Path, log: Path, rows: int | None) -> tuple[int, list[tuple[str, int, int, int]]]:
    """Run the extraction in a forked process, killed once it has computed ``rows`` rows (None: not
    killed).

    Returns its exit status and what it logged: (key, first row, rows, resident bytes) of each
    block, in order.
    """
    log.write_bytes(b"")
    read = lambda lines: [(key, *map(int, numbers)) for key, *numbers in map(str.split, lines)]
    child = os.fork()
    if child == 0:
        os.environ["FUNGI_STORE"] = str(root)
        real = store.Rows.write
        with log.open("a", buffering=1) as file:

            def write(self, start, block):
                file.write(f"{self.key} {start} {len(block)} {memory()}\n")
                return real(self, start, block)

            store.Rows.write, backbones._create = write, tiny
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            try:
                extract.main(COMMAND)
                os._exit(0)
            except BaseException:
                os._exit(1)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        lines = log.read_text().splitlines()
        if ended:
            return os.waitstatus_to_exitcode(status), read(lines)
        blocks = read(lines[:-1])  # the last line may be in the writing
        if rows is not None and sum(length for _, length in computed(blocks)) >= max(1, rows):
            os.kill(child, signal.SIGKILL)
            rows = None
        time.sleep(0.02)


def computed(blocks: list[tuple[str, int, int, int]]) -> list[tuple[int, int]]:
    """(first row, rows) of every batch: embeddings and gradients are written one after the other,
    one key each.
    """
    return [(first, length) for key, first, length, _ in blocks if key == blocks[0][0]]


def on_disk(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*.npy"))}


def complete(root: Path, count: int) -> np.ndarray:
    """Which rows are on disk, embedding and gradient, from the shards' names: (count,) bool."""
    out = np.zeros(count, int)
    for file in root.glob("*/*.npy"):
        out[int(file.name[:9]) : int(file.name[:9]) + store.SHARD] += 1
    return out == 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", type=Path, help="where images and stores go (default: a temporary one)"
    )
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/resume_cpu.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        record = measure(Path(scratch), args.images, args.kills, args.seed)
    out = args.out or Path(__file__).parent / "results" / "resume_cpu.json"
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    return 0 if record["identical"] and record["computed_though_on_disk"] == 0 else 1


def measure(folder: Path, count: int, kills: int, seed: int) -> dict:
    os.environ["FUNGI_DATA"] = str(folder)
    make(folder / f"{NAME}.npz", count)
    start, root, log = time.perf_counter(), folder / "killed", folder / "log"
    rng = views.generator("kills", seed)
    attempts, waste, again, bars = (
        [],
        0,
        0,
        tqdm(total=kills + 2, desc="attempts", disable=not sys.stderr.isatty()),
    )
    for i in range(kills + 1):
        had = complete(root, count)
        rows = None if i == kills else int(rng.uniform(0, 1.6 * count / (kills + 1)))
        status, blocks = attempt(root, log, rows)
        if status not in (0, -signal.SIGKILL):
            raise RuntimeError(f"attempt {i} ended with status {status}")
        has = complete(root, count)
        for first, length in computed(blocks):
            part = slice(first, first + length)
            again += int(had[part].sum())  # was on disk already: must not happen
            waste += int((~has[part]).sum())  # the kill took it
        attempts.append({"killed_after": rows, "status": status, "peak_mib": _mib(blocks)})
        bars.update()
    seconds = time.perf_counter() - start
    status, blocks = attempt(folder / "undisturbed", log, None)
    bars.update()
    files, expected = on_disk(root), on_disk(folder / "undisturbed")
    middle = [_mib(blocks[: max(1, share * len(blocks) // 10)]) for share in range(1, 11)]
    return {
        "machine": {"processor": figures.cpu(), "cores": os.cpu_count()},
        "command": " ".join(["python -m fungi_core.extract", *COMMAND]),
        "images": count,
        "kills": sum(one["status"] == -signal.SIGKILL for one in attempts),
        "shard_rows": store.SHARD,
        "identical": status == 0 and len(expected) > 0 and files == expected,
        "files": len(files),
        "temporary_files_left": len(list(root.rglob("*.tmp"))),
        "computed_though_on_disk": again,
        "rows_lost_to_kills": waste,
        "seconds_killed_run": round(seconds, 1),
        "peak_mib_by_tenth_of_the_undisturbed_run": middle,
        "attempts": attempts,
    }


def _mib(blocks: list) -> float | None:
    return round(max(resident for *_, resident in blocks) / 2**20, 1) if blocks else None


if __name__ == "__main__":
    sys.exit(main())

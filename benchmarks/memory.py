"""Peak memory, each figure from a process of its own.

    python benchmarks/memory.py [--backbone random:vit_base_patch16_224] [--images 36] [--out FILE.json]

1. SimCLR extraction of a batch of images (49 views each) against timm's forward pass on 64 views,
same weights, dtype. 2. PCA (to the width) and kNN (1,000 queries, k = 20) of N rows beyond the rows
themselves, for growing N.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from companion.figures import style as figures

WIDTH = 384


def peak(device: str) -> int:
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def stock(backbone: str, device: str, images: int) -> int:
    from companion import throughput
    from fungi_core import backbones

    encoder = backbones.load(backbone, device=device)
    forward = throughput.stock(encoder)
    forward(torch.randn(64, 3, encoder.size, encoder.size).to(encoder.device, encoder.dtype))
    return peak(device)


def simclr(backbone: str, device: str, images: int) -> int:
    from run import ours  # the same images and parts as the benchmark of speed

    call, _ = ours("simclr", backbone, device, images)
    call()
    return peak(device)


def ends(backbone: str, device: str, rows: int) -> int:
    """Bytes beyond the rows: of a PCA to the width and a kNN search with them as the training set."""
    from companion.evaluate import knn as evaluate
    from fungi_core import pca

    rng = np.random.default_rng(0)
    train = np.empty((rows, WIDTH), np.float32)
    for start in range(0, rows, 10_000):
        train[start : start + 10_000] = rng.standard_normal(
            (min(10_000, rows - start), WIDTH), np.float32
        )
    queries, labels = train[:1000] + 0.1, np.arange(rows) % 10
    before = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fitted = pca.fit_pca(train, WIDTH // 2)
    evaluate.knn_predict(train, labels, queries, k=20)
    del fitted
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


def in_a_process(which: str, backbone: str, device: str, count: int) -> int:
    arguments = [sys.executable, __file__, "--worker", which, backbone, device, str(count)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{which} {backbone} failed: {done.stderr.strip().splitlines()[-1]}")
    return int(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="random:vit_base_patch16_224")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, default=36)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        which, backbone, device, count = args.worker
        return print(
            {"stock": stock, "simclr": simclr, "ends": ends}[which](backbone, device, int(count))
        )

    record = {"backbone": args.backbone, "device": args.device, "images": args.images}
    record["machine"] = {"processor": figures.cpu(), "cores": os.cpu_count()}
    for which in ("stock", "simclr"):
        record[which] = in_a_process(which, args.backbone, args.device, args.images)
        print(f"{which}: peak {record[which] / 2**30:.2f} GiB", flush=True)
    print(
        f"SimCLR of {args.images} images beyond stock: {(record['simclr'] - record['stock']) / 2**30:+.2f} GiB"
    )
    record["ends"] = {}
    for rows in (25_000, 50_000, 100_000):
        record["ends"][rows] = in_a_process("ends", args.backbone, args.device, rows)
        features = rows * WIDTH * 4 / 2**20
        extra = record["ends"][rows] / 2**20
        print(
            f"PCA and kNN of {rows} rows ({features:.0f} MiB): {extra:.0f} MiB beyond them",
            flush=True,
        )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

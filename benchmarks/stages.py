"""Where the time of an extraction goes: decoding, views, trunk, tail and loss, projection, writing.

    python benchmarks/stages.py [--backbone random:vit_small_patch16_224] [--device cpu]

The stages of `fungi_core.rows.gradient_rows`, one after another on the same images (an extraction
prepares the next batch beside the model), each the median of a few runs. Beside the trunk stands
what it reaches of a plain matrix product in the same dtype: the share of the hardware.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from run import OBJECTIVES, drawn, matrix_flops, pictures, seconds
from torch.utils.flop_counter import FlopCounterMode

from fungi_core import load
from fungi_core.backbones import Backbone
from fungi_core.devices import default_modes
from fungi_core.rows import batch_size, view_batches
from fungi_core.store import open_entry


def decoded(files: list[Path], backbone: Backbone) -> list[Image.Image]:
    """Decode image files as an extraction does."""
    return [backbone.inputs.decode(file, file.name) for file in files]


def written(rows: np.ndarray, folder: Path) -> None:
    """Write rows into a new entry of a store."""
    with tempfile.TemporaryDirectory(dir=folder) as root:
        entry = open_entry({"benchmark": "stages"}, *rows.shape, Path(root))
        with entry.lock():
            entry.write(0, rows)


@default_modes()
def stages(name: str, backbone: Backbone, folder: Path, repeats: int) -> tuple[dict, float]:
    """Return {stage: median seconds an image} of one objective, and the trunk's FLOP/s."""
    objective, part = OBJECTIVES[name], drawn(name, backbone)
    images = pictures(name, backbone.device)[: batch_size(backbone, objective.views)]
    files = [folder / f"{i}.jpg" for i in range(len(images))]
    for file, image in zip(files, images, strict=True):
        image.save(file, quality=90)

    views = lambda: list(view_batches(backbone, objective.views, name, images, 0))
    [(_, batch)] = views()
    with FlopCounterMode(display=False) as counted:
        seen = backbone.trunk(batch)
    factors = lambda: objective.factors(
        backbone, seen, part.heads, part.negatives, [backbone.layer]
    )
    (made,) = factors()[1]
    project = partial(part.projection.apply, made, backbone.dtype)
    rows = project().numpy(force=True)
    calls = {
        "decode": partial(decoded, files, backbone),
        "views": views,
        "trunk": partial(backbone.trunk, batch),
        "tail, loss": factors,
        "projection": project,
        "write": partial(written, rows, folder),
    }
    median = lambda call: float(np.median(seconds(call, backbone.device, repeats)))
    found = {stage: median(call) / len(images) for stage, call in calls.items()}
    return found, counted.get_total_flops() / len(images) / found["trunk"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="random:vit_small_patch16_224")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    backbone = load(args.backbone, device=args.device)
    plain = matrix_flops(backbone.device, backbone.dtype, args.repeats)
    print(f"{args.backbone}, {backbone.dtype}; a plain product: {plain / 1e9:.0f} GFLOP/s")
    for name in OBJECTIVES:
        with tempfile.TemporaryDirectory() as folder:
            found, flops = stages(name, backbone, Path(folder), args.repeats)
        whole = sum(found.values())
        shares = ", ".join(f"{stage} {s / whole:.1%}" for stage, s in found.items())
        print(f"{name}: {1000 * whole:.1f} ms an image: {shares}", end="; ")
        print(f"trunk {flops / 1e9:.0f} GFLOP/s, {flops / plain:.2f} of the product's")


if __name__ == "__main__":
    main()

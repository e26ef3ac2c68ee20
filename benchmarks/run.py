"""Images per second as ratios in one run on one machine: stock embedding, ours, the published one.

    python benchmarks/run.py [--backbone random:vit_small_patch16_224] [--device cpu] [--out FILE]

Ours against stock: `companion.throughput`. Ours against `fungivision` 0.0.2 (the authors' library,
of the extra ``test``): the same decoded images in, projected gradients out, wall clock, each in a
process of its own so that peak memory is its own; the library in fp32 (its half precision has no
effect on a CPU), ours in its default dtype. Per-token features: the projection of 1,024 tokens'
gradients, as a share of the machine's measured matrix rate.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from companion import throughput
from companion.provenance import cpu
from fungi_core import DINO, KL, SimCLR, load
from fungi_core.backbones import Backbone
from fungi_core.gradients import Factors, linear_layer
from fungi_core.projection import Rademacher
from fungi_core.rows import Parts, draw_parts, gradient_rows

OBJECTIVES = {"kl": KL(), "dino": DINO(), "simclr": SimCLR()}
IMAGES = {"kl": 32, "dino": 4, "simclr": 2}  # decoded 256 x 256 images a timed call on a CPU
MORE = 4  # times as many on a card, which a few do not fill
NEGATIVES = 256 * 49  # latents; their values do not change the time


def pictures(name: str, device: str) -> list[Image.Image]:
    """Return the images of one objective's timed call."""
    count = IMAGES[name] * (1 if device == "cpu" else MORE)
    noise = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    return [Image.fromarray(pixels).resize((256, 256), Image.BICUBIC) for pixels in noise]


def drawn(name: str, encoder: Backbone, negatives: int = NEGATIVES) -> Parts:
    """Return what is random about an objective's features, its negatives noise."""
    objective = OBJECTIVES[name]
    parts = draw_parts(encoder, objective, 0)
    if objective.negatives:
        parts.negatives = torch.randn(negatives, objective.dim).to(encoder.device)
    return parts


def ours(name: str, backbone: str, device: str, negatives: int):
    """Return a call that makes features, and of how many images."""
    encoder, objective = load(backbone, device=device), OBJECTIVES[name]
    parts, images = drawn(name, encoder, negatives), pictures(name, device)
    return lambda: list(gradient_rows(encoder, objective, [parts], images, 0)), len(images)


def published(name: str, backbone: str, device: str, negatives: int):
    """Return the same of the published library."""
    import fungivision.config as config
    from fungivision import FUNGIWrapper

    kinds = {"kl": config.KLConfig, "dino": config.DINOConfig, "simclr": config.SimCLRConfig}
    settings, encoder = kinds[name](), load(backbone, device=device, dtype="float32")
    model, where = throughput.plain_model(encoder), torch.device(device)
    size = {"input_dim": encoder.inputs.size}
    wrapper = FUNGIWrapper(model, encoder.layer, where, **size, extractor_configs=[settings])
    if name == "simclr":
        latents = torch.randn(negatives, settings.latent_dim).to(device)
        wrapper.extractors[0].comparison_batch = latents
    images = pictures(name, device)
    return lambda: wrapper(images), len(images)


def seconds(call, device: str, repeats: int) -> list[float]:
    """Return the wall-clock seconds of each repeat, behind one that is not counted."""
    return [throughput.seconds(call, device) for _ in range(repeats + 1)][1:]


def per_call(call, device: str, repeats: int, least: float = 0.02) -> float:
    """Return the median seconds of a call, short ones timed many in a row, ``least`` s together.

    Launching a kernel and waiting for a card take longer than a short kernel itself.
    """
    many = max(1, round(least / min(seconds(call, device, 2))))

    def in_a_row() -> None:
        for _ in range(many):
            call()

    return float(np.median(seconds(in_a_row, device, repeats))) / many


def matrix_flops(device: str, dtype: torch.dtype, repeats: int, side: int | None = None) -> float:
    """Return the FLOP/s of a plain product of square matrices, by default 2,048 or 8,192 wide."""
    side, rng = side or (2048 if device == "cpu" else 8192), torch.Generator().manual_seed(0)
    a, b = (torch.randn(side, side, generator=rng).to(device, dtype) for _ in range(2))
    return 2 * side**3 / per_call(lambda: a @ b, device, repeats)


def per_token(encoder, repeats: int, tokens: int = 1024, side: int | None = None) -> dict:
    """Measure the projection of ``tokens`` outer products at the target layer.

    Beside it stands what a plain matrix product reaches here.
    """
    layer = linear_layer(encoder.model, encoder.layer)
    columns = int(np.prod(encoder.gradient_shape()))
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(encoder.device)
    inputs, gradients = draw(1, tokens, layer.in_features), draw(1, tokens, layer.out_features)
    factors = Factors(inputs, gradients, layer.bias is not None)
    made = Rademacher(encoder.width, columns, "benchmark")
    project = lambda: made.apply_tokens(factors, encoder.dtype)
    own = per_call(project, encoder.device, repeats)
    flops = 2 * tokens * columns * encoder.width / own
    matrix = matrix_flops(encoder.device, encoder.dtype, repeats, side)
    return {
        "tokens": tokens,
        "seconds": own,
        "share": flops / matrix,
        "flops": flops,
        "matrix_flops": matrix,
    }


def measured(
    which: str, name: str, backbone: str, device: str, repeats: int, negatives: int = NEGATIVES
) -> dict:
    """Measure one library: images/s, and this process's (or the card's) peak memory in bytes."""
    make = {"ours": ours, "published": published}[which]
    call, count = make(name, backbone, device, negatives)
    times = seconds(call, device, repeats)
    peak = peak_bytes() if device == "cpu" else torch.cuda.max_memory_allocated(device)
    return {"images_per_second": count / float(np.median(times)), "peak_bytes": peak}


def peak_bytes() -> int:
    """Return the most memory that this process held, since it became this program.

    What getrusage says of a process counts what the one that started it held.
    """
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)[1]) * 1024


def in_a_process(*arguments: str | int) -> dict:
    """Return what `measured` does in a process of its own."""
    command = [sys.executable, __file__, "--worker", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        what = " ".join(map(str, arguments))
        sys.exit(f"benchmark {what} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def against_published(backbone: str, device: str, measure=in_a_process, repeats: int = 2) -> dict:
    """Measure both libraries for each objective: speeds, their ratio and peak memory."""
    found = {}
    for name in IMAGES:
        pair = {
            which: measure(which, name, backbone, device, repeats)
            for which in ("ours", "published")
        }
        speed = {which: one["images_per_second"] for which, one in pair.items()}
        peak = {which: one["peak_bytes"] >> 20 for which, one in pair.items()}
        ratio = speed["ours"] / speed["published"]
        print(f"{name}: {speed['ours']:.2f} images/s, {ratio:.1f} times the published", end=" ")
        print(f"{speed['published']:.2f}; peak {peak['ours']} against {peak['published']} MiB")
        found[name] = pair | {"ratio": ratio}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="random:vit_small_patch16_224")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        *where, repeats = args.worker
        return print(json.dumps(measured(*where, int(repeats))))

    encoder = load(args.backbone, device=args.device)
    stock = throughput.measure(encoder, views_a_call=98, repeats=args.repeats)
    print(stock.round(2).to_string(index=False))
    tokens = per_token(encoder, args.repeats)
    print(f"projection of {tokens['tokens']} tokens: {tokens['seconds']:.2f} s,", end=" ")
    print(f"{tokens['flops'] / 1e9:.0f} GFLOP/s, {tokens['share']:.2f} of a plain matrix product's")
    pairs = against_published(args.backbone, encoder.device)
    if args.out:
        machine = {"processor": cpu(), "cores": os.cpu_count(), "torch": torch.__version__}
        if encoder.device != "cpu":
            machine["gpu"] = torch.cuda.get_device_name(encoder.device)
        record = {"backbone": args.backbone, "device": encoder.device}
        record |= {"dtype": str(encoder.dtype), "machine": machine}
        record |= {"stock": stock.to_dict("records"), "published": pairs, "per_token": tokens}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

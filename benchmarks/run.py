"""Images per second as ratios in one run on one machine: stock embedding, ours, and the published
library.

    python benchmarks/run.py [--backbone random:vit_small_patch16_224] [--device cpu] [--repeats 5] [--out FILE.json]

Ours against stock: `fungi_core.throughput`. Ours against `fungivision` 0.0.2 (the authors' library,
installed with the ``test`` extra): the same decoded images in, projected gradients out, wall clock,
each in a process of its own so that peak memory is its own; the library in fp32 (its half precision
has no effect on a CPU), ours in its default dtype. Per-token features: the projection of 1,024
tokens' gradients, as a share of the machine's measured matrix rate.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from companion import throughput
from companion.figures import style as figures
from fungi_core import backbones, fungi, gradients, objectives, projection

IMAGES = {"kl": 32, "dino": 4, "simclr": 2}  # decoded 256 x 256 images a timed call


def pictures(count: int) -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    return [Image.fromarray(pixels).resize((256, 256), Image.BICUBIC) for pixels in noise]


def ours(name: str, backbone: str, device: str, count: int | None = None):
    encoder = backbones.load(backbone, device=device)
    objective = objectives.by_name(name)
    parts = fungi.draw_parts(encoder, objective, 0)
    if objective.negatives:  # their values do not change the time
        parts.negatives = torch.randn(256 * 49, objective.dim).to(encoder.device)
    images = pictures(count or IMAGES[name])
    return lambda: list(fungi.rows(encoder, objective, parts, images, 0)), len(images)


def published(name: str, backbone: str, device: str):
    import fungivision.config as config
    from fungivision import FUNGIWrapper

    settings = {"kl": config.KLConfig, "dino": config.DINOConfig, "simclr": config.SimCLRConfig}[
        name
    ]()
    encoder = backbones.load(backbone, device=device, dtype="float32")
    wrapper = FUNGIWrapper(
        throughput.plain_model(encoder),
        encoder.layer,
        torch.device(device),
        extractor_configs=[settings],
    )
    if name == "simclr":
        wrapper.extractors[0].comparison_batch = torch.randn(256 * 49, settings.latent_dim).to(
            device
        )
    images = pictures(IMAGES[name])
    return lambda: wrapper(images), len(images)


def seconds(call, device: str, repeats: int) -> list[float]:
    """Wall-clock seconds of each repeat, behind one that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times


def per_token(encoder, repeats: int, tokens: int = 1024) -> dict:
    """Projection of ``tokens`` outer products at the target layer, and what a plain matrix product
    reaches here.
    """
    layer = gradients.linear_layer(encoder.model, encoder.layer)
    d_out, d_in = layer.out_features, layer.in_features
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(encoder.device)
    factors = gradients.Factors(
        draw(1, tokens, d_in), draw(1, tokens, d_out), layer.bias is not None
    )
    made = projection.Rademacher(encoder.width, encoder.gradient_size(), "benchmark")
    own = np.median(
        seconds(lambda: made.apply_tokens(factors, encoder.dtype), encoder.device, repeats)
    )
    side = 2048 if encoder.device == "cpu" else 8192
    a, b = (draw(side, side).to(encoder.dtype) for _ in range(2))
    plain = np.median(seconds(lambda: a @ b, encoder.device, repeats))
    rates = {
        "flops": 2 * tokens * encoder.gradient_size() * encoder.width / own,
        "matrix_flops": 2 * side**3 / plain,
    }
    copy = np.median(seconds(lambda: a.clone(), encoder.device, repeats))
    rates["copy_bytes_per_second"] = 2 * a.numel() * a.element_size() / copy
    return {
        "tokens": tokens,
        "seconds": float(own),
        "share": rates["flops"] / rates["matrix_flops"],
    } | rates


def worker(which: str, name: str, backbone: str, device: str, repeats: int) -> None:
    call, count = {"ours": ours, "published": published}[which](name, backbone, device)
    times = seconds(call, device, repeats)
    peak = (
        torch.cuda.max_memory_allocated()
        if device != "cpu"
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    print(json.dumps({"images_per_second": count / float(np.median(times)), "peak_bytes": peak}))


def in_a_process(*arguments: str) -> dict:
    done = subprocess.run(
        [sys.executable, __file__, "--worker", *arguments], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"benchmark {' '.join(arguments)} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="random:vit_small_patch16_224")
    parser.add_argument("--device", default=backbones.auto_device())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        *where, repeats = args.worker
        return worker(*where, int(repeats))

    encoder = backbones.load(args.backbone, device=args.device)
    stock = throughput.measure(encoder, views_a_call=98, repeats=args.repeats)
    print(stock.round(2).to_string(index=False))
    tokens = per_token(encoder, args.repeats)
    print(
        f"per-token projection: {tokens['seconds']:.2f} s for {tokens['tokens']} tokens, {tokens['flops'] / 1e9:.0f} "
        f"GFLOP/s, {tokens['share']:.2f} of a plain matrix product's {tokens['matrix_flops'] / 1e9:.0f}"
    )
    against = {}
    for name in IMAGES:
        pair = {
            which: in_a_process(which, name, args.backbone, args.device, "2")
            for which in ("ours", "published")
        }
        pair["ratio"] = pair["ours"]["images_per_second"] / pair["published"]["images_per_second"]
        against[name] = pair
        fast, slow = pair["ours"], pair["published"]
        print(
            f"{name}: {fast['images_per_second']:.2f} images/s, published {slow['images_per_second']:.2f}",
            end="; ",
        )
        print(
            f"{pair['ratio']:.1f} times; peak {fast['peak_bytes'] >> 20} against {slow['peak_bytes'] >> 20} MiB"
        )
    if args.out:
        machine = dict(processor=figures.cpu(), cores=os.cpu_count(), torch=torch.__version__)
        if args.device != "cpu":
            machine["gpu"] = torch.cuda.get_device_name()
        record = dict(
            backbone=args.backbone, device=args.device, dtype=str(encoder.dtype), machine=machine
        )
        record |= dict(stock=stock.to_dict("records"), published=against, per_token=tokens)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

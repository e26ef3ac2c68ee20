"""Images per second of features against the stock forward pass, as ratios within one run on one
machine (Table 22).
"""

import ctypes
import json
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch
from PIL import Image

from companion import paths
from companion.encoders.objectives import named
from companion.encoders.table import load
from companion.protocol import LETTERS
from fungi_core.backbones import Backbone
from fungi_core.features import normalize
from fungi_core.objectives import Objective
from fungi_core.rows import Parts, draw_negatives, draw_parts, gradient_rows
from fungi_core.seeds import generator


def plain_model(backbone: Backbone) -> torch.nn.Module:
    """Return the same architecture and weights as timm runs them, in the backbone's dtype."""
    model = load(backbone.name, device=backbone.device, dtype=backbone.dtype).model
    for module in model.modules():
        if hasattr(module, "fused_attn"):  # off in ours on CPUs; timm's default is on
            module.fused_attn = bool(timm.layers.use_fused_attn())
    return model


def stock(backbone: Backbone) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the floor's yardstick: timm's own forward pass."""
    model = plain_model(backbone)

    def forward(x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return model(x)

    return forward


def measure(
    backbone: Backbone,
    names: Sequence = ("kl", "dino", "simclr"),
    *,
    views_a_call: int = 64,
    repeats: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    """Time each objective against stock: features, views, value and floor (images/s), ratio.

    Every repeat times the stock forward pass on ``views_a_call`` views and then the feature on images
    that make as many views or more, so that drift of the machine hits both; medians are reported,
    the ratio with its lowest and highest. Ours starts from decoded uint8 images (normalisation,
    patches, loss, backward and projection included); the floor is the stock pass over as many views.
    ``K`` is embedding and KL gradient together.
    """
    rng = torch.Generator().manual_seed(seed)
    size, device = backbone.inputs.size, backbone.device
    plain = stock(backbone)
    x = torch.randn(views_a_call, 3, size, size, generator=rng).to(device, backbone.dtype)
    rows = []
    for objective in (named(name, backbone) for name in names):
        count = objective.views.count(backbone.inputs)
        images = max(1, round(views_a_call / count))
        blank = Image.new("RGB", (size, size))
        drawn = objective.views.draw(blank, backbone.inputs, generator(seed), "cpu")
        shape = (images, *drawn.shape)
        batch = torch.randint(0, 256, shape, generator=rng, dtype=torch.uint8)
        part = draw_parts(backbone, objective, seed)
        if objective.negatives:  # the latents' values do not change the time
            latents = (objective.negatives * count, objective.dim)
            part.negatives = torch.randn(latents, generator=rng).to(device)
        ours = lambda b=batch, o=objective, p=part: feature(backbone, o, p, b)
        times = [
            (seconds(lambda: plain(x), device), seconds(ours, device)) for _ in range(repeats + 1)
        ]
        stock_seconds, our_seconds = np.array(times[1:]).T  # the first call of each warms up
        floor, speed = views_a_call / stock_seconds / count, images / our_seconds
        ratio = speed / floor
        medians = np.median(speed), np.median(floor), np.median(ratio)
        rows.append((LETTERS[objective.name], count, *medians, ratio.min(), ratio.max()))
    columns = ["features", "views", "value", "floor", "ratio", "ratio_low", "ratio_high"]
    return pd.DataFrame(rows, columns=columns)


def feature(backbone: Backbone, objective: Objective, part: Parts, batch: torch.Tensor):
    """Return projected gradients (B, d) of decoded images (B, n, s, s, 3) uint8."""
    views = objective.views.finish(batch.to(backbone.device), backbone.inputs, backbone.dtype)
    _, (factors,) = objective.factors(backbone, views, [part.heads], [part.negatives], [part.layer])
    return part.projection.apply(factors, backbone.dtype)


def precision(
    name: str, images: Sequence, names: Sequence[str] = ("kl", "dino", "simclr"), *, seed: int = 0
) -> pd.DataFrame:
    """Return cosines of the default dtype's features to float32's on the same images.

    Columns: features, dtype, mean, median, lowest, and how many images are below 0.99. Heads,
    projection, views and negatives (the images' own, in float32) are the same in both.
    """
    low, full = load(name), load(name, dtype="float32")
    dtype, rows = str(low.dtype).removeprefix("torch."), []
    for objective in (named(one, full) for one in names):
        part = draw_parts(full, objective, seed)
        part.negatives = draw_negatives(full, objective, part.heads, images, seed)
        done = [list(gradient_rows(one, objective, [part], images, seed)) for one in (low, full)]
        found = {LETTERS[objective.name]: [[g for *_, (g,) in rows] for rows in done]}
        if done[0][0][1] is not None:
            found = {"E": [[e for _, e, _ in rows] for rows in done]} | found
        for letter, blocks in found.items():
            a, b = (normalize(np.concatenate(block)) for block in blocks)
            cosine = (a * b).sum(1)
            summary = cosine.mean(), np.median(cosine), cosine.min(), int((cosine < 0.99).sum())
            rows.append((letter, dtype, *summary))
    return pd.DataFrame(
        rows, columns=["features", "dtype", "mean", "median", "lowest", "below 0.99"]
    )


def against_published(folder: Path = paths.ROOT / "benchmarks" / "results") -> pd.DataFrame:
    """What `benchmarks/run.py` measured against the published library: machine, backbone, features,
    images/s of both (value, published), their ratio, and peak memory of both in GiB (memory,
    published_memory).
    """
    rows = []
    for file in sorted(folder.glob("speed_*.json")):
        record = json.loads(file.read_text())
        for name, pair in record["published"].items():
            ours, theirs = pair["ours"], pair["published"]
            machine = f"{record['machine']['processor']}, {record['machine']['cores']} cores"
            machine = record["machine"].get("gpu") or machine
            speed = ours["images_per_second"], theirs["images_per_second"], pair["ratio"]
            memory = ours["peak_bytes"] / 2**30, theirs["peak_bytes"] / 2**30
            rows.append(
                (
                    machine,
                    record["backbone"].removeprefix("random:"),
                    LETTERS[name],
                    *speed,
                    *memory,
                )
            )
    columns = [
        "machine",
        "backbone",
        "features",
        "value",
        "published",
        "ratio",
        "memory",
        "published_memory",
    ]
    return pd.DataFrame(rows, columns=columns)


def seconds(call: Callable[[], object], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(call: Callable[[], object]) -> float:
    """MiB that ``call`` took at its peak beyond what was in use before: of the card, or of this
    process (Linux).

    NaN where neither can be told.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        call()
        return float("nan")
    kib = lambda field: int(re.search(rf"{field}:\s+(\d+)", status.read_text())[1])
    # What was freed before would otherwise hide what is taken now.
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    reset.write_text("5")  # the peak starts again from what is resident now
    before = kib("VmRSS")
    call()
    return (kib("VmHWM") - before) / 1024

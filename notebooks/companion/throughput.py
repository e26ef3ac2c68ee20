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

from companion import paths
from fungi_core import backbones, fungi, objectives, views
from fungi_core.extract import LETTERS


def plain_model(backbone: backbones.Backbone) -> torch.nn.Module:
    """The same architecture and weights as timm runs them, untouched, in the backbone's dtype and
    on its device.
    """
    dtype = str(backbone.dtype).removeprefix("torch.")
    model = backbones.load(backbone.name, device=backbone.device, dtype=dtype).model
    for module in model.modules():
        if hasattr(
            module, "fused_attn"
        ):  # `backbones.load` switches it off on CPUs; timm's default is on
            module.fused_attn = bool(timm.layers.use_fused_attn())
    return model


def stock(backbone: backbones.Backbone) -> Callable[[torch.Tensor], torch.Tensor]:
    """The floor's yardstick: timm's own forward pass."""
    model = plain_model(backbone)

    def forward(x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return model(x)

    return forward


def measure(
    backbone: backbones.Backbone,
    names: Sequence = ("kl", "dino", "simclr"),
    *,
    views_a_call: int = 64,
    repeats: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    """Features, value and floor (images/s), ratio with its lowest and highest, views.

    Every repeat times the stock forward pass on ``views_a_call`` views and then the feature on
    images that make as many views or more, so that drift of the machine hits both; medians are
    reported. Ours starts from decoded uint8 images on the device (normalisation, patches, loss,
    backward, projection included); the floor is the stock pass over the same number of views. ``K``
    is embedding and KL gradient together.
    """
    generator = torch.Generator().manual_seed(seed)
    size, device = backbone.size, backbone.device
    plain = stock(backbone)
    x = torch.randn(views_a_call, 3, size, size, generator=generator).to(device, backbone.dtype)
    rows = []
    for name in names:
        objective = objectives.by_name(name) if isinstance(name, str) else name
        count = fungi.view_count(backbone, objective)
        images = max(1, round(views_a_call / count))
        shape = (images, 1 if objective.views == "patches" else count, size, size, 3)
        batch = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        parts = fungi.draw_parts(backbone, objective, seed)
        if objective.negatives:  # the latents' values do not change the time
            parts.negatives = torch.randn(
                objective.negatives * count, objective.dim, generator=generator
            ).to(device)
        ours = lambda b=batch, o=objective, p=parts: fungi.project_gradients(
            backbone,
            o,
            p,
            views.finish(b.to(device), o, backbone.mean, backbone.std, backbone.dtype),
        )
        times = np.array(
            [
                (_seconds(lambda: plain(x), device), _seconds(ours, device))
                for _ in range(repeats + 1)
            ][1:]
        )
        floor, speed = views_a_call / times[:, 0] / count, images / times[:, 1]
        ratio = speed / floor
        rows.append(
            (
                LETTERS[objective.name],
                count,
                np.median(speed),
                np.median(floor),
                np.median(ratio),
                ratio.min(),
                ratio.max(),
            )
        )
    return pd.DataFrame(
        rows, columns=["features", "views", "value", "floor", "ratio", "ratio_low", "ratio_high"]
    )


def precision(
    name: str, images: Sequence, names: Sequence[str] = ("kl", "dino", "simclr"), *, seed: int = 0
) -> pd.DataFrame:
    """Cosine of the default dtype's features to float32's on the same images: features, dtype,
    mean, median, lowest, and how many images are below 0.99.

    Heads, projection, views and negatives (the images' own, in float32) are the same in both.
    """
    low, full = backbones.load(name), backbones.load(name, dtype="float32")
    rows = []
    for objective in map(objectives.by_name, names):
        parts = fungi.draw_parts(full, objective, seed)
        if objective.negatives:
            parts.negatives = fungi.negative_latents(full, objective, parts.heads, images, seed)
        found = [
            list(fungi.rows(encoder, objective, parts, images, seed)) for encoder in (low, full)
        ]
        pairs = [tuple(np.concatenate([gradients for _, _, gradients in done]) for done in found)]
        letters = [LETTERS[objective.name]]
        if objective.views == "whole":
            pairs.insert(
                0,
                tuple(np.concatenate([embeddings for _, embeddings, _ in done]) for done in found),
            )
            letters.insert(0, "E")
        for letter, (a, b) in zip(letters, pairs, strict=True):
            cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
            dtype = str(low.dtype).removeprefix("torch.")
            rows.append(
                (
                    letter,
                    dtype,
                    cosine.mean(),
                    np.median(cosine),
                    cosine.min(),
                    int((cosine < 0.99).sum()),
                )
            )
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


def _seconds(call: Callable[[], object], device: str) -> float:
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
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(
            0
        )  # what was freed before would otherwise hide what is taken now
    reset.write_text("5")  # the peak starts again from what is resident now
    before = kib("VmRSS")
    call()
    return (kib("VmHWM") - before) / 1024

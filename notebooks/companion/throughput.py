"""Images per second of features against the stock forward pass, within one run (Table 22)."""

import json
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pandas as pd
import timm
import torch
from PIL import Image

from companion import paths
from companion.encoders.loading import load
from companion.figures.style import LETTERS
from fungi_core import DINO, KL, SimCLR
from fungi_core.backbones import Backbone
from fungi_core.features import normalize
from fungi_core.objectives import Objective
from fungi_core.rows import draw_negatives, draw_parts, gradient_rows
from fungi_core.seeds import generator

OBJECTIVES = KL(), DINO(), SimCLR()


def plain_model(backbone: Backbone) -> torch.nn.Module:
    """Return the same architecture and weights as timm runs them, in the backbone's dtype."""
    model = load(backbone.name, device=backbone.device, dtype="float32").model.to(backbone.dtype)
    for module in model.modules():
        if hasattr(module, "fused_attn"):  # off in ours on CPUs; timm's default is on
            module.fused_attn = bool(timm.layers.use_fused_attn())
    return model


def measure(
    backbone: Backbone,
    objectives: Sequence[Objective] = OBJECTIVES,
    *,
    views_a_call: int,
    repeats: int,
    seed: int = 0,
) -> pd.DataFrame:
    """Time each objective against stock: features, views, value and floor (images/s), ratio.

    Every repeat times the stock forward pass on ``views_a_call`` views and then the feature on
    images that make about as many, so that drift of the machine hits both; medians are reported,
    the ratio with its lowest and highest. The floor is stock over the number of views. ``K`` is
    embedding and KL gradient together.
    """
    size, device, dtype = backbone.inputs.size, backbone.device, backbone.dtype
    model, rng = plain_model(backbone), torch.Generator().manual_seed(seed)
    x = torch.randn(views_a_call, 3, size, size, generator=rng).to(device, dtype)
    stock = torch.inference_mode()(lambda: model(x))
    rows = []
    for objective in objectives:
        count = objective.views.count(backbone.inputs)
        images = max(1, round(views_a_call / count))
        ours = feature(backbone, objective, images, seed)
        times = [(seconds(stock, device), seconds(ours, device)) for _ in range(repeats + 1)]
        stock_seconds, our_seconds = np.array(times[1:]).T  # the first call of each warms up
        floor, speed = views_a_call / stock_seconds / count, images / our_seconds
        ratio = speed / floor
        medians = np.median(speed), np.median(floor), np.median(ratio)
        rows.append((LETTERS[objective.name], count, *medians, ratio.min(), ratio.max()))
    columns = ["features", "views", "value", "floor", "ratio", "ratio_low", "ratio_high"]
    return pd.DataFrame(rows, columns=columns)


def feature(
    backbone: Backbone, objective: Objective, images: int, seed: int
) -> Callable[[], torch.Tensor]:
    """Return a call that makes projected gradients (images, d) of decoded images.

    It starts from uint8 views on the device: normalisation, patches, loss, backward and projection
    are included. Pixels and negatives are noise, since values do not change the time.
    """
    inputs, rng = backbone.inputs, torch.Generator().manual_seed(seed)
    blank = Image.new("RGB", (inputs.size, inputs.size))
    drawn = objective.views.draw(blank, inputs, generator(seed), "cpu")
    batch = torch.randint(0, 256, (images, *drawn.shape), generator=rng, dtype=torch.uint8)
    batch = batch.to(backbone.device)
    part, negatives = draw_parts(backbone, objective, seed), None
    if objective.negatives:
        count = objective.negatives * objective.views.count(inputs)
        negatives = torch.randn(count, objective.dim, generator=rng).to(backbone.device)

    def call() -> torch.Tensor:
        views = objective.views.finish(batch, inputs, backbone.view_dtype)
        _, (factors,) = objective.factors(backbone, views, part.heads, negatives, [part.layer])
        return part.projection.apply(factors, backbone.dtype)

    return call


def precision(
    name: str, images: Sequence, *, device="auto", dtype="auto", seed: int = 0
) -> pd.DataFrame:
    """Return cosines of features in ``dtype`` ("auto": the default) to float32's, of the images.

    Columns: features, dtype, mean, median, lowest, and how many images are below 0.99. Heads,
    projection, views and negatives (the images' own, in float32) are the same in both.
    """
    low, full = (load(name, device=device, dtype=d) for d in (dtype, "float32"))
    dtype, table = str(low.dtype).removeprefix("torch."), []
    for objective in OBJECTIVES:
        part = draw_parts(full, objective, seed)
        part.negatives = draw_negatives(full, objective, part.heads, images, seed)
        both = [list(gradient_rows(one, objective, [part], images, seed)) for one in (low, full)]
        found = {LETTERS[objective.name]: [[g for _, _, (g,) in rows] for rows in both]}
        if objective.sees_whole:  # the embedding comes along
            found = {"E": [[e for _, e, _ in rows] for rows in both]} | found
        for letter, blocks in found.items():
            a, b = (normalize(np.concatenate(block)) for block in blocks)
            cosine = (a * b).sum(1)
            summary = cosine.mean(), np.median(cosine), cosine.min(), int((cosine < 0.99).sum())
            table.append((letter, dtype, *summary))
    columns = ["features", "dtype", "mean", "median", "lowest", "below 0.99"]
    return pd.DataFrame(table, columns=columns)


def against_published() -> pd.DataFrame:
    """Return what `benchmarks/run.py` measured against the published library, a row a feature.

    Columns: machine, backbone, features; images/s of both (value, published) and their ratio; peak
    memory of both in GiB (memory, published_memory), NaN where it was not measured.
    """
    rows = []
    for file in sorted((paths.ROOT / "benchmarks" / "results").glob("speed_*.json")):
        record = json.loads(file.read_text())
        machine, backbone = record["machine"], record["backbone"].removeprefix("random:")
        processor = f"{machine['processor']}, {machine['cores']} cores"
        for name, pair in record["published"].items():
            both = pair["ours"], pair["published"]
            speeds = [one["images_per_second"] for one in both]
            memory = [(one["peak_bytes"] or np.nan) / 2**30 for one in both]
            where = machine.get("gpu", processor), backbone, LETTERS[name]
            rows.append((*where, *speeds, pair["ratio"], *memory))
    columns = ["machine", "backbone", "features", "value", "published", "ratio", "memory"]
    return pd.DataFrame(rows, columns=[*columns, "published_memory"])


def seconds(call: Callable[[], object], device: str) -> float:
    """Return the wall-clock seconds of a call, until the device has done it."""
    wait = (lambda: None) if device == "cpu" else partial(torch.cuda.synchronize, device)
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start

"""Golden features: what every objective, projection and path gives in float32 for a few made-up
images, texts and sounds.

``python tests/golden.py`` writes ``golden.safetensors`` anew. Do so only where EXTRACTION was
raised: a change here is a change of every stored feature.
"""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from vectors import pictures

from companion.data import clips
from companion.encoders.loading import load
from companion.encoders.objectives import IBOT, DeepCluster, FullAugmentation, named
from fungi_core import DINO, KL, Fungi, SimCLR, tokens
from fungi_core.rows import draw_negatives, draw_parts, gradient_rows
from fungi_core.views import Crops, Patches

FILE = Path(__file__).with_suffix(".safetensors")
SEED = 0
MICRO = "vit_micro.sup_tin100"
COARSE = Patches(stride=2)

IMAGES = {
    "kl": KL(),
    "kl, eq. 6": KL(direction="latent_uniform"),
    "kl, no head": KL(head=False, normalize=False),
    "dino": DINO(Crops(local_count=4)),
    "dino, shared head": DINO(Crops(local_count=2), independent_heads=False),
    "dino, no head": DINO(Crops(local_count=2), head=False),
    "dino, full augmentation": DINO(FullAugmentation(local_count=3)),
    "dino, native": DINO(Crops(local_count=3, native=True)),
    "simclr": SimCLR(COARSE, negatives=2),
    "simclr, published denominator": SimCLR(COARSE, denominator="published", negatives=2),
    "simclr, no head": SimCLR(COARSE, head=False, negatives=2),
    "simclr, native": SimCLR(replace(COARSE, native=True), negatives=2),
    "deepcluster": DeepCluster(replace(DeepCluster().views, local_count=2), images_per_cluster=1),
    "ibot": IBOT(Crops(local_count=2)),
}
TEXTS = [
    "a short sentence",
    "the quick brown fox jumps over the lazy dog",
    "gradients of a frozen network",
    "one",
]


def sounds() -> list[np.ndarray]:
    return [clips.synthesised(None, True).items[i] for i in (0, 70, 200)]


def gradients(encoder, objective, items, layers=(None,), kind="rademacher") -> list[dict]:
    """Gradients at each layer from one pass, with the embedding that comes along."""
    parts = [draw_parts(encoder, objective, SEED, layer, kind) for layer in layers]
    negatives = draw_negatives(encoder, objective, parts[0].heads, items, SEED)
    parts = [replace(part, negatives=negatives) for part in parts]
    done = list(gradient_rows(encoder, objective, parts, items, SEED))
    out = [{"gradient": np.concatenate([rows[i] for *_, rows in done])} for i in range(len(parts))]
    if objective.sees_whole:
        out[0]["embedding"] = np.concatenate([embedding for _, embedding, _ in done])
    return out


def images() -> dict[str, np.ndarray]:
    encoder = load(MICRO, device="cpu", dtype="float32")
    general, found = replace(encoder, fast=False), {}
    for name, objective in IMAGES.items():
        (found[name],) = gradients(encoder, objective, pictures())
    for name in ("kl", "dino", "simclr"):
        (found[f"{name}, general path"],) = gradients(general, IMAGES[name], pictures())
        for layer in ("blocks.0.attn.proj", "blocks.5.mlp.fc2"):
            (found[f"{name}, {layer}"],) = gradients(encoder, IMAGES[name], pictures(), [layer])
        for kind in ("khatri-rao", "sketch", "exact"):
            (made,) = gradients(encoder, IMAGES[name], pictures(), kind=kind)
            found[f"{name}, {kind}"] = made
    layers = ["blocks.1.mlp.fc1", "blocks.5.mlp.fc2"]
    together, _ = gradients(encoder, IMAGES["kl"], pictures(), layers)
    found["kl, layers together"] = {"gradient": together["gradient"][:2]}
    return {
        f"image, {name}, {part}": block
        for name, blocks in found.items()
        for part, block in blocks.items()
    }


def transformer() -> dict[str, np.ndarray]:
    small = (IMAGES["kl"], IMAGES["dino"], IMAGES["simclr"])
    encoder = load(MICRO, device="cpu", dtype="float32")
    return {"Fungi": Fungi(encoder, objectives=small, pca=None).fit_transform(pictures())}


def texts() -> dict[str, np.ndarray]:
    encoder = load("all-MiniLM-L6-v2", device="cpu", dtype="float32")
    found = {}
    for name, more in {"kl": {}, "simclr": {"negatives": 3}, "mlm": {}}.items():
        (blocks,) = gradients(encoder, replace(named(name, encoder), **more), TEXTS)
        found |= {f"text, {name}, {part}": block for part, block in blocks.items()}
    return found


def audio() -> dict[str, np.ndarray]:
    found = {}
    names = ["vit_micro.on_spectrograms"]
    names += ["whisper-tiny.en"] if os.environ.get("FUNGI_DATA") else []
    for name in names:
        encoder = load(name, device="cpu", dtype="float32")
        for kind, more in {"kl": {}, "simclr": {"negatives": 2}}.items():
            (blocks,) = gradients(encoder, replace(named(kind, encoder), **more), sounds())
            found |= {f"audio, {name}, {kind}, {part}": block for part, block in blocks.items()}
    return found


def patches() -> dict[str, np.ndarray]:
    encoder = load(MICRO, device="cpu", dtype="float32").at_size(32)
    pixels = [np.asarray(image.resize((32, 32))) for image in pictures()]
    support = tokens.unit_tokens(encoder, pixels[1:])[:, 1:].flatten(0, 1)
    found = {"patches, embedding": tokens.unit_tokens(encoder, pixels[:1])[0, 1:].numpy()}
    loss = replace(tokens.LOSS, denominator="eq5")
    part = draw_parts(encoder, loss, SEED)
    wanted = [(loss, part, SEED)]
    (rows,) = tokens.unit_gradients(encoder, pixels[:1], ["0"], support, wanted)
    found["patches, gradient"] = rows[0].numpy()
    return found


def features() -> dict[str, np.ndarray]:
    """{name: (rows, width) float32}."""
    return images() | transformer() | texts() | audio() | patches()


if __name__ == "__main__":
    save_file(
        {name: np.ascontiguousarray(block, np.float32) for name, block in features().items()}, FILE
    )

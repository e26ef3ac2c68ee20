"""Golden features: what every objective, projection and path gives in float32 for a few made-up
images, texts and sounds.

``python tests/golden.py`` writes ``golden.safetensors`` anew. Do so only where EXTRACTION was
raised: a change here is a change of every stored feature.
"""

import os
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from vectors import pictures

from companion.data import clips
from fungi_core import fungi, objectives, tokens
from fungi_core.backbones import load

FILE = Path(__file__).with_suffix(".safetensors")
SEED = 0
MICRO = "vit_micro.sup_tin100"
SIMCLR = dict(stride_scale=2, negatives=2)

IMAGES = {
    "kl": objectives.KL(),
    "kl, eq. 6": objectives.KL(direction="latent_uniform"),
    "kl, no head": objectives.KL(head=False, normalize=False),
    "dino": objectives.DINO(local_crops=4),
    "dino, shared head": objectives.DINO(local_crops=2, independent_heads=False),
    "dino, no head": objectives.DINO(local_crops=2, head=False),
    "dino, full augmentation": objectives.DINO(local_crops=3, augmentation="full"),
    "dino, native": objectives.DINO(local_crops=3, native=True),
    "simclr": objectives.SimCLR(**SIMCLR),
    "simclr, published denominator": objectives.SimCLR(denominator="published", **SIMCLR),
    "simclr, no head": objectives.SimCLR(head=False, **SIMCLR),
    "simclr, native": objectives.SimCLR(native=True, **SIMCLR),
    "deepcluster": objectives.DeepCluster(images_per_cluster=1, local_crops=2),
    "ibot": objectives.IBOT(local_crops=2),
}
TEXTS = [
    "a short sentence",
    "the quick brown fox jumps over the lazy dog",
    "gradients of a frozen network",
    "one",
]


def sounds() -> list[np.ndarray]:
    return [clips.synthesised(None, True, False).items[i] for i in (0, 70, 200)]


def gradients(encoder, objective, items, layer=None, kind="rademacher") -> dict[str, np.ndarray]:
    parts = fungi.draw_parts(encoder, objective, SEED, layer, kind)
    if objective.negatives:
        parts.negatives = fungi.negative_latents(encoder, objective, parts.heads, items, SEED)
    done = list(fungi.rows(encoder, objective, parts, items, SEED, layer))
    out = {"gradient": np.concatenate([gradient for *_, gradient in done])}
    if done[0][1] is not None:
        out["embedding"] = np.concatenate([embedding for _, embedding, _ in done])
    return out


def images() -> dict[str, np.ndarray]:
    encoder, general = (load(MICRO, device="cpu", dtype="float32") for _ in range(2))
    general.fast, found = False, {}
    for name, objective in IMAGES.items():
        found[name] = gradients(encoder, objective, pictures())
    for name in ("kl", "dino", "simclr"):
        found[f"{name}, general path"] = gradients(general, IMAGES[name], pictures())
        for layer in ("blocks.0.attn.proj", "blocks.5.mlp.fc2"):
            found[f"{name}, {layer}"] = gradients(encoder, IMAGES[name], pictures(), layer)
        for kind in ("khatri-rao", "sketch", "exact"):
            found[f"{name}, {kind}"] = gradients(encoder, IMAGES[name], pictures(), None, kind)
    together = {
        layer: fungi.draw_parts(encoder, IMAGES["kl"], SEED, layer)
        for layer in ("blocks.1.mlp.fc1",)
    }
    (_, rows), *rest = fungi.layer_rows(encoder, IMAGES["kl"], together, pictures()[:2], SEED)
    found["kl, layers together"] = {"gradient": rows["blocks.1.mlp.fc1"]}
    return {
        f"image, {name}, {part}": block
        for name, blocks in found.items()
        for part, block in blocks.items()
    }


def transformer() -> dict[str, np.ndarray]:
    small = (IMAGES["kl"], IMAGES["dino"], IMAGES["simclr"])
    made = fungi.Fungi(MICRO, objectives=small, pca=None, device="cpu", dtype="float32")
    return {"Fungi": made.fit_transform(pictures())}


def texts() -> dict[str, np.ndarray]:
    encoder = load("all-MiniLM-L6-v2", device="cpu", dtype="float32")
    named = {"kl": {}, "simclr": dict(negatives=3), "mlm": {}}
    chosen = {name: objectives.by_name(name, "text", **more) for name, more in named.items()}
    found = {name: gradients(encoder, one, TEXTS) for name, one in chosen.items()}
    return {
        f"text, {name}, {part}": block
        for name, blocks in found.items()
        for part, block in blocks.items()
    }


def audio() -> dict[str, np.ndarray]:
    found = {}
    names = [
        "vit_micro.on_spectrograms",
        *(["whisper-tiny.en"] if os.environ.get("FUNGI_DATA") else []),
    ]
    for name in names:
        encoder = load(name, device="cpu", dtype="float32")
        for kind, more in {"kl": {}, "simclr": dict(negatives=2)}.items():
            blocks = gradients(encoder, objectives.by_name(kind, "audio", **more), sounds())
            found |= {f"audio, {name}, {kind}, {part}": block for part, block in blocks.items()}
    return found


def patches() -> dict[str, np.ndarray]:
    encoder = tokens.encoder(MICRO, 32, device="cpu", dtype="float32")
    pixels = [np.asarray(image.resize((32, 32))) for image in pictures()]
    found = {}
    support = tokens.Extractor(encoder, ["embedding"], seed=SEED)(pixels[1:], ["1", "2"])[
        "embedding"
    ].flatten(0, 1)
    for name, loss in {
        "": tokens.Loss(),
        ", published": tokens.Loss(denominator="published", neighbours="published"),
    }.items():
        kinds = tokens.KINDS if not name else ("rademacher",)
        blocks = tokens.Extractor(encoder, kinds, loss, SEED, support)(pixels[:1], ["0"])
        found |= {f"patches, {kind}{name}": block[0].numpy() for kind, block in blocks.items()}
    return found


def features() -> dict[str, np.ndarray]:
    """{name: (rows, width) float32}."""
    return images() | transformer() | texts() | audio() | patches()


if __name__ == "__main__":
    save_file(
        {name: np.ascontiguousarray(block, np.float32) for name, block in features().items()}, FILE
    )

"""Test vectors: what one seed gives on every machine. ``python tests/vectors.py`` writes
vectors.json anew; do so only where EXTRACTION was raised, for a change here is a change of every
feature.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fungi_core import backbones, fungi, objectives, projection, views

FILE = Path(__file__).with_suffix(".json")
BACKBONE, SEED = "vit_micro.sup_tin100", 0
OBJECTIVES = (objectives.KL(), objectives.DINO(), objectives.SimCLR(stride_scale=2, negatives=4))


def pictures() -> list[Image.Image]:
    """Three images made of integers alone, so that no decoder or library can change them."""
    out = []
    for i, (width, height) in enumerate(((64, 64), (90, 70), (48, 100))):
        y, x, c = np.mgrid[:height, :width, :3]
        out.append(
            Image.fromarray(
                ((x * (3 + i) + y * (5 - i) + 40 * c + (x * y >> (4 + i))) % 256).astype(np.uint8)
            )
        )
    return out


def sha(array) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def exact() -> dict:
    """Everything that must be the same bit for bit: hashes, or the integers themselves where they
    are few.
    """
    encoder, images = backbones.load(BACKBONE, device="cpu", dtype="float32"), pictures()
    found = {
        "backbone": encoder.fingerprint,
        "images": [views.sample_id(image) for image in images],
        "projection": sha(
            projection.sign_bits(
                encoder.width, encoder.gradient_size(), BACKBONE, SEED, encoder.layer
            )
        ),
        "projection, first row": projection.sign_bits(1, 64, BACKBONE, SEED, encoder.layer)[
            0
        ].tolist(),
        "negatives": views.generator("negatives", SEED).permutation(20).tolist(),
    }
    dino = objectives.DINO()
    scales = np.array(
        [dino.global_scale] * dino.global_crops + [dino.local_scale] * dino.local_crops
    )
    for i, image in enumerate(images):
        rng = views.generator(SEED, "dino", views.sample_id(image))
        found[f"boxes of image {i}"] = views.crop_boxes(*image.size, scales, rng).tolist()
    for objective in OBJECTIVES:
        heads = fungi.draw_parts(encoder, objective, SEED).heads
        found[f"heads of {objective.name}"] = {
            name: sha(head.numpy()) for name, head in heads.items()
        }
    for kind in ("khatri-rao", "sketch"):
        drawn = projection.draw(kind, 16, 4, 5, BACKBONE, SEED, encoder.layer)
        parts = (
            [drawn.left, drawn.right] if kind == "khatri-rao" else [*drawn.buckets, *drawn.signs]
        )
        found[f"projection {kind}"] = [sha(part.numpy()) for part in parts]
    return found


def features() -> dict[str, np.ndarray]:
    """Embedding and projected gradients of the three images, (3, D) float32: the same within 1e-4
    of their length.
    """
    encoder, images, out = backbones.load(BACKBONE, device="cpu", dtype="float32"), pictures(), {}
    for objective in OBJECTIVES:
        parts = fungi.draw_parts(encoder, objective, SEED)
        if objective.negatives:
            parts.negatives = fungi.negative_latents(encoder, objective, parts.heads, images, SEED)
        done = list(fungi.rows(encoder, objective, parts, images, SEED))
        out[objective.name] = np.concatenate([gradients for _, _, gradients in done])
        if objective.views == "whole":
            out["embedding"] = np.concatenate([embeddings for _, embeddings, _ in done])
    return out


def main() -> None:
    rounded = {
        name: [[float(f"{x:.7g}") for x in row] for row in block]
        for name, block in features().items()
    }
    FILE.write_text(json.dumps({"exact": exact(), "features": rounded}) + "\n")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()

"""Test vectors: what one seed gives on every machine. ``python tests/vectors.py`` writes
vectors.json anew; do so only where EXTRACTION was raised, for a change here is a change of every
feature.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
from PIL import Image

from companion.encoders.loading import load
from fungi_core import DINO, KL, SimCLR, projection
from fungi_core.rows import draw_parts
from fungi_core.seeds import content_id, generator
from fungi_core.views import crop_boxes

FILE = Path(__file__).with_suffix(".json")
BACKBONE, SEED = "vit_micro.sup_tin100", 0


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
    """Everything that must be the same bit for bit: hashes, or integers where they are few."""
    encoder, images = load(BACKBONE, device="cpu", dtype="float32"), pictures()
    ids = [content_id(encoder.inputs.content(image)) for image in images]
    rows, columns = encoder.gradient_shape()
    keys = BACKBONE, SEED, encoder.layer
    found = {
        "backbone": encoder.fingerprint,
        "images": ids,
        "projection": sha(projection.sign_bits(encoder.width, rows * columns, *keys)),
        "projection, first row": projection.sign_bits(1, 64, *keys)[0].tolist(),
        "negatives": generator("negatives", SEED).permutation(20).tolist(),
    }
    crops = DINO().views
    scales = [crops.global_scale] * crops.global_count + [crops.local_scale] * crops.local_count
    for i, image in enumerate(images):
        boxes = crop_boxes(*image.size, np.array(scales), generator(SEED, "dino", ids[i]))
        found[f"boxes of image {i}"] = boxes.tolist()
    for objective in (KL(), DINO(), SimCLR()):
        heads = draw_parts(encoder, objective, SEED).heads
        hashes = {name: sha(head.numpy()) for name, head in heads.items()}
        found[f"heads of {objective.name}"] = hashes
    for kind in ("khatri-rao", "sketch"):
        drawn = projection.draw(kind, 16, 4, 5, *keys)
        parts = (
            [drawn.left, drawn.right] if kind == "khatri-rao" else [*drawn.buckets, *drawn.signs]
        )
        found[f"projection {kind}"] = [sha(part.numpy()) for part in parts]
    return found


if __name__ == "__main__":
    FILE.write_text(json.dumps(exact()) + "\n")

"""The training script of the mini backbones, for one step on noise: the files it writes are what
`fungi_core.load` reads.
"""

import io
import json
import os
import subprocess
import sys

import numpy as np
from PIL import Image
from safetensors.torch import load_file

from companion import paths
from companion.encoders.table import table
from fungi_core import load


def write_noise(file, train=256, test=100):
    """A packed data set of noise, all PNG."""
    rng, encoded = np.random.default_rng(0), []
    for _ in range(train + test):
        buffer = io.BytesIO()
        pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    np.savez(
        file,
        data=np.frombuffer(b"".join(encoded), np.uint8),
        offsets=np.cumsum([0, *map(len, encoded)]),
        labels=np.r_[np.arange(train) % 100, np.arange(test) % 100].astype(np.int16),
        split=np.repeat([0, 1], [train, test]).astype(np.uint8),
    )


def test_one_step_writes_a_checkpoint_that_loads_and_a_card(tmp_path):
    write_noise(tmp_path / "tiny_imagenet_100a.npz")
    name = "vit_micro.sup_tin100"
    script = paths.BACKBONES / "train.py"
    command = [sys.executable, str(script), name, "--epochs", "1", "--out", str(tmp_path)]
    subprocess.run(
        command, env=os.environ | {"FUNGI_DATA": str(tmp_path)}, check=True, capture_output=True
    )
    card = json.loads((tmp_path / f"{name}.json").read_text())
    assert (
        card["curve"][-1].keys() >= {"epoch", "loss", "minutes", "val_top1", "val_knn20"}
        and card["seed"] == 0
    )
    made, committed = (
        load_file(folder / f"{name}.safetensors") for folder in (tmp_path, paths.BACKBONES)
    )
    assert {k: v.shape for k, v in made.items()} == {k: v.shape for k, v in committed.items()}
    one = load(tmp_path / f"{name}.safetensors")
    other = load(paths.BACKBONES / f"{name}.safetensors")
    assert (one.inputs, one.layer, one.width) == (other.inputs, other.layer, other.width)


def test_committed_cards_say_what_the_checkpoints_are():
    for spec in (row for name, row in table().items() if name.endswith("_tin100")):
        card = json.loads((paths.BACKBONES / f"{spec.name}.json").read_text())
        file = paths.BACKBONES / f"{spec.name}.safetensors"
        assert card["name"] == spec.name and card["recipe"]["epochs"] == card["curve"][-1]["epoch"]
        assert file.stat().st_size <= 11 * 2**20 and "ImageNet" in card["data"]
        assert card["parameters"] == sum(v.numel() for v in load_file(file).values())
        best = {"vit_mini.sup_tin100": 36.0}  # the target set before training
        assert card["curve"][-1].get("val_top1", 100) >= best.get(spec.name, 0)

"""The training script of the mini backbones, for one step on noise: the files it writes are what
`backbones` loads.
"""

import json
import os
import subprocess
import sys

import numpy as np
from safetensors.torch import load_file

from companion import pack, paths
from companion.data.images import Split
from fungi_core import backbones


def split(n, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (n, 64, 64, 3), dtype=np.uint8)
    names = [f"{i}.png" for i in range(n)]
    return Split(list(pixels), np.arange(n) % 100, names, [f"class {i}" for i in range(100)])


def test_one_step_writes_a_checkpoint_that_loads_and_a_card(tmp_path):
    pack.write(tmp_path / "tiny_imagenet_100a.npz", split(256, 0), split(100, 1))
    name = "vit_micro.sup_tin100"
    script = paths.backbones_dir() / "train.py"
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
        load_file(folder / f"{name}.safetensors") for folder in (tmp_path, paths.backbones_dir())
    )
    assert {k: v.shape for k, v in made.items()} == {k: v.shape for k, v in committed.items()}
    assert backbones.load(name).width == made["norm.weight"].shape[0]


def test_committed_cards_say_what_the_checkpoints_are():
    for spec in (s for s in backbones.BACKBONES.values() if s.size == 64):
        card = json.loads((paths.backbones_dir() / f"{spec.name}.json").read_text())
        file = paths.backbones_dir() / f"{spec.name}.safetensors"
        assert card["name"] == spec.name and card["recipe"]["epochs"] == card["curve"][-1]["epoch"]
        assert file.stat().st_size <= 11 * 2**20 and "ImageNet" in card["data"]
        assert card["parameters"] == sum(v.numel() for v in load_file(file).values())
        best = {"vit_mini.sup_tin100": 36.0}  # the target set before training
        assert card["curve"][-1].get("val_top1", 100) >= best.get(spec.name, 0)

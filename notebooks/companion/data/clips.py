"""Sources of audio data sets: ESC-50 and SpeechCommands V2 as published, packed parquet files,
synthesised sounds.

A source takes the data folder and whether the training split is asked for, and returns a `Split`:
where each clip is, not the clip. Folds are data sets of their own: fold i is the test split, the
other folds are the training split.

``audio_esc.parquet`` (see `packed.table`) has the columns audio, label, in_esc10 and in_esc50_fold4
(bool), and the folds ``fold`` (1 to 5) and ``split4`` (1 to 4).
"""

from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from companion.data import folders, packed
from companion.data.images import Split
from fungi_core.seeds import generator

RATE = 16_000  # Hz, as `fungi_core.audio` decodes clips; here, since images need no audio library


def esc50(root: Path, train: bool, fold: str) -> Split:
    """Return ESC-50 as unpacked (meta/esc50.csv, audio/*.wav): 5 official folds of 400 clips."""
    base = root / "ESC-50-master"
    table = pd.read_csv(base / "meta" / "esc50.csv").sort_values("filename")
    classes = table.sort_values("target")["category"].unique().tolist()
    rows = table[(table["fold"] != int(fold)) == train]
    names = rows["filename"].tolist()
    return Split(
        [base / "audio" / name for name in names], rows["target"].to_numpy(), names, classes
    )


def speech_commands(root: Path, train: bool) -> Split:
    """Return SpeechCommands V2, 35 words.

    The test split is testing_list.txt; the training split is what neither list names.
    """
    base = root / "speech_commands_v0.02"
    validation, testing = (
        (base / f"{kind}_list.txt").read_text().split() for kind in ("validation", "testing")
    )
    words = [name for name in folders.class_names([base]) if not name.startswith("_")]
    found = [f"{word}/{name}" for word in words for name, _ in folders.files(base / word)]
    training = {name for name in found if name.endswith(".wav")} - {*validation, *testing}
    names = sorted(training if train else testing)
    labels = np.array([words.index(name.partition("/")[0]) for name in names], np.int64)
    return Split([base / name for name in names], labels, names, words)


def packed_esc(root: Path, train: bool, part: str) -> Split:
    """Return a part of audio_esc.parquet; ``part`` is "member/column/fold", which fold is the test.

    Members: "in_esc10", ESC-10, whole: 10 classes, 5 official folds of 80 clips ("fold"); and
    "in_esc50_fold4", ESC-50's fourth fold alone: 50 classes of 8 clips in 4 parts ("split4"). These
    parts are the file's own, clips cut from one recording share one, and their numbers cannot be
    compared with ESC-50's published protocol.
    """
    member, column, fold = part.split("/")
    table, classes = packed.table(root / "audio_esc.parquet", "audio", "label", member, column)
    table = table[table[member]]
    labels, present = pd.factorize(table["label"], sort=True)  # ESC-10's ten of the fifty
    rows = table.assign(label=labels)[(table[column] != int(fold)) == train]
    return packed.taken(rows, "audio", [classes[i] for i in present])


KINDS = (
    *("tone", "vibrato", "rising chirp", "falling chirp"),
    *("harmonics", "beating tone", "noise burst", "clicks"),
)
EACH = 60  # clips of a class in a split


def synthesised(root: Path, train: bool) -> Split:
    """Return synthetic sounds of 1 s, of eight kinds."""
    split, drawn = "train" if train else "test", list(product(KINDS, range(EACH)))
    draw = lambda kind, i: synthesise(kind, generator("synthesised sound", kind, split, i))
    labels, names = np.repeat(np.arange(len(KINDS)), EACH), [f"{k} {split} {i}" for k, i in drawn]
    return Split([draw(*one) for one in drawn], labels, names, list(KINDS))


def synthesise(kind: str, rng: np.random.Generator) -> np.ndarray:
    """Return one second of a kind of sound in noise, (16000,) float32, values of 16 bits.

    Its pitch is 150 Hz to 3 kHz (log-uniform), its length 0.25 to 0.7 s, anywhere in the second;
    its power while it sounds is 10 dB above to 10 dB below that of the noise.
    """
    n = round(RATE * rng.uniform(0.25, 0.7))
    start, t = rng.integers(RATE - n), np.arange(n) / RATE
    pitch = 150 * 20 ** rng.random()
    # a chirp's pitch, relative to its middle
    bend = np.exp(rng.uniform(0.4, 1.2) * (t / t[-1] - 0.5))
    rate, depth = rng.uniform(4, 12), rng.uniform(0.5, 1.0)
    swing = np.sin(2 * np.pi * rate * t + rng.uniform(0, 2 * np.pi))
    if kind == "noise burst":
        sound = rng.standard_normal(n) * np.exp(-t / rng.uniform(0.1, 0.4))
    elif kind == "clicks":
        sound = np.zeros(n)
        sound[:: int(RATE / (3 * rate))] = 1
        sound = np.convolve(sound, np.sin(2 * np.pi * pitch * t[:64]) * np.hanning(64))[:n]
    else:
        vibrato = 1 + 0.12 * depth * swing
        course = {"vibrato": vibrato, "rising chirp": bend, "falling chirp": bend[::-1]}
        phase = 2 * np.pi * np.cumsum(pitch * course.get(kind, np.ones(n))) / RATE
        overtones = range(1, 7) if kind == "harmonics" else (1,)
        sound = sum(np.sin(h * phase) / h for h in overtones if h * pitch < RATE / 2)
        sound = sound * (1 - depth * (0.5 + 0.5 * swing)) if kind == "beating tone" else sound
    to_an_end = np.minimum(np.arange(n), np.arange(n)[::-1])
    sound = sound * np.minimum(1, to_an_end / (0.01 * RATE))  # no click at its ends
    noise = rng.standard_normal(RATE)
    clip = noise.copy()
    clip[start : start + n] += sound * np.sqrt(10 ** rng.uniform(-1, 1) / np.mean(sound**2))
    clip *= rng.uniform(0.1, 0.9) / np.abs(clip).max()
    return (np.rint(clip * 32767) / 32768).astype(np.float32)

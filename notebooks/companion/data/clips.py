"""Sources of audio data sets: ESC-50 and SpeechCommands V2 as published, packed parquet files,
synthesised sounds.

As in `samples` a source takes (root of the downloads, train or test, whether to download) and gives
a `Split`: where each clip is, not the clip. Folds are splits of their own: fold i is the test
split, the others are the training split.

Packed files hold a clip as the bytes of an audio file in the column audio, label (0-based) and
filename, and the class names in label order as JSON in the schema's metadata under ``class_names``.
``audio_fsdd.parquet`` has split ("train", "test") besides; ``audio_esc.parquet`` in_esc10,
in_esc50_fold4 (bool) and the folds fold (1 to 5) and split4 (1 to 4).
"""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from companion.data import corpora
from companion.data.images import Split
from fungi_core.audio import RATE
from fungi_core.seeds import generator


def esc50(root: Path, train: bool, download: bool, *, fold: int) -> Split:
    """ESC-50 as its repository unpacks: meta/esc50.csv and audio/*.wav; 5 official folds of 400
    clips of 5 s.
    """
    base = root / "ESC-50-master"
    with (base / "meta" / "esc50.csv").open(newline="") as file:
        table = sorted(csv.DictReader(file), key=lambda row: row["filename"])
    names = {int(row["target"]): row["category"] for row in table}
    rows = [row for row in table if (int(row["fold"]) != fold) == train]
    labels = np.array([int(row["target"]) for row in rows], np.int64)
    files = [row["filename"] for row in rows]
    return Split(
        [base / "audio" / name for name in files], labels, files, [names[i] for i in sorted(names)]
    )


def speech_commands(root: Path, train: bool, download: bool) -> Split:
    """SpeechCommands V2, 35 words: the test split is testing_list.txt; training, what neither list
    names.
    """
    base = root / "speech_commands_v0.02"
    listed = {
        kind: (base / f"{kind}_list.txt").read_text().split() for kind in ("validation", "testing")
    }
    words = sorted(x.name for x in base.iterdir() if x.is_dir() and not x.name.startswith("_"))
    if train:
        held = {*listed["validation"], *listed["testing"]}
        names = [
            name
            for word in words
            for x in sorted((base / word).glob("*.wav"))
            if (name := f"{word}/{x.name}") not in held
        ]
    else:
        names = sorted(listed["testing"])
    place = {word: i for i, word in enumerate(words)}
    labels = np.array([place[name.partition("/")[0]] for name in names], np.int64)
    return Split([base / name for name in names], labels, names, words)


def packed_esc10(root: Path, train: bool, download: bool, *, fold: int) -> Split:
    """ESC-10, whole, from audio_esc.parquet: 10 classes, 5 official folds of 80 clips of 5 s."""
    return _packed_esc(root, "in_esc10", "fold", fold, train)


def packed_esc50_fold4(root: Path, train: bool, download: bool, *, fold: int) -> Split:
    """The fourth fold of ESC-50 alone, from audio_esc.parquet: 50 classes of 8 clips, in 4 folds of
    that file's own.

    Clips cut from one recording share a fold. Not a number to compare with ESC-50's published
    protocol.
    """
    return _packed_esc(root, "in_esc50_fold4", "split4", fold, train)


def _packed_esc(root: Path, member: str, column: str, fold: int, train: bool) -> Split:
    table, classes = _parquet(
        root / "audio_esc.parquet", "audio", "label", "filename", member, column
    )
    kept = np.flatnonzero(table[member] & ((table[column] != fold) == train))
    present = np.unique(table["label"][table[member]])  # ESC-10's ten of the fifty
    labels = np.searchsorted(present, table["label"][kept]).astype(np.int64)
    names = [table["filename"][i] for i in kept]
    return Split([table["audio"][i] for i in kept], labels, names, [classes[i] for i in present])


def fsdd(root: Path, train: bool, download: bool) -> Split:
    """Spoken digits of six speakers from audio_fsdd.parquet: recordings 5-19 of each train, the
    official 0-4 test.
    """
    table, classes = _parquet(root / "audio_fsdd.parquet", "audio", "label", "filename", "split")
    kept = np.flatnonzero(table["split"] == ("train" if train else "test"))
    names = [table["filename"][i] for i in kept]
    return Split(
        [table["audio"][i] for i in kept], table["label"][kept].astype(np.int64), names, classes
    )


def _parquet(file: Path, *names: str) -> tuple[dict[str, np.ndarray], list[str]]:
    """Columns of a packed file, in its order, and its class names."""
    table = corpora.columns(file, *names)
    classes = json.loads((table.schema.metadata or {})[b"class_names"])
    return {name: table[name].to_numpy() for name in names}, classes


KINDS = (
    "tone",
    "vibrato",
    "rising chirp",
    "falling chirp",
    "harmonics",
    "beating tone",
    "noise burst",
    "clicks",
)
EACH = 60  # clips of a class in a split


@dataclass(frozen=True)
class Synthesised(Sequence):
    """Clips made when asked for: i -> waveform, `EACH` of every kind, one kind after the other."""

    split: str

    def __len__(self) -> int:
        return EACH * len(KINDS)

    def __getitem__(self, i: int) -> np.ndarray:
        kind = KINDS[i // EACH]
        return synthesise(kind, generator("synthesised sound", kind, self.split, i % EACH))


def synthesised(root: Path, train: bool, download: bool) -> Split:
    """Synthetic sounds of 1 s, eight kinds, each with random pitch, place, length and background
    noise.
    """
    split = "train" if train else "test"
    labels = np.repeat(np.arange(len(KINDS)), EACH)
    names = [f"{KINDS[label]} {split} {i % EACH}" for i, label in enumerate(labels)]
    return Split(Synthesised(split), labels, names, list(KINDS))


def synthesise(kind: str, rng: np.random.Generator) -> np.ndarray:
    """One second of ``kind`` in noise, (16000,) float32, 16 bit values.

    Pitch 150 Hz to 3 kHz (log-uniform), 0.25 to 0.7 s long, anywhere in the second, 10 dB above to
    10 dB below the noise's power while it sounds.
    """
    n = round(RATE * rng.uniform(0.25, 0.7))
    start, t = rng.integers(RATE - n), np.arange(n) / RATE
    pitch = 150 * 20 ** rng.random()
    bend = np.exp(
        rng.uniform(0.4, 1.2) * (t / t[-1] - 0.5)
    )  # a chirp's pitch, relative to its middle
    rate, depth = rng.uniform(4, 12), rng.uniform(0.5, 1.0)
    swing = np.sin(2 * np.pi * rate * t + rng.uniform(0, 2 * np.pi))
    if kind == "noise burst":
        sound = rng.standard_normal(n) * np.exp(-t / rng.uniform(0.1, 0.4))
    elif kind == "clicks":
        sound = np.zeros(n)
        sound[:: int(RATE / (3 * rate))] = 1
        sound = np.convolve(sound, np.sin(2 * np.pi * pitch * t[:64]) * np.hanning(64))[:n]
    else:
        course = {
            "vibrato": 1 + 0.12 * depth * swing,
            "rising chirp": bend,
            "falling chirp": bend[::-1],
        }
        phase = 2 * np.pi * np.cumsum(pitch * course.get(kind, np.ones(n))) / RATE
        overtones = range(1, 7) if kind == "harmonics" else (1,)
        sound = sum(np.sin(h * phase) / h for h in overtones if h * pitch < RATE / 2)
        sound = sound * (1 - depth * (0.5 + 0.5 * swing)) if kind == "beating tone" else sound
    sound = sound * np.minimum(
        1, np.minimum(np.arange(n), np.arange(n)[::-1]) / (0.01 * RATE)
    )  # no click at its ends
    noise = rng.standard_normal(RATE)
    clip = noise.copy()
    clip[start : start + n] += sound * np.sqrt(10 ** rng.uniform(-1, 1) / np.mean(sound**2))
    clip *= rng.uniform(0.1, 0.9) / np.abs(clip).max()
    return (np.rint(clip * 32767) / 32768).astype(np.float32)

"""Sounds: decoding, the inputs of an audio encoder, and the noise views of eq. 7.

A clip is a float32 waveform (n,) at 16 kHz. An encoder's front end turns it into a filter bank in
natural logarithms, (T, F): T frames of 10 ms, F mel bands. Noise is added to the bank itself, as
eq. 7 is printed and the published code does it; then the bank is scaled to the encoder's own units.
"""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.signal import resample_poly  # scikit-learn brings it

from .inputs import Inputs, Views, one_line, readable
from .objectives import SimCLR

RATE = 16_000  # Hz
_CHANNELS = 32  # at most: what has more is a filter bank, no waveform


@dataclass(frozen=True)
class Noise(Views):
    """Take noisy, shifted copies of a clip's filter bank (eq. 7; 16 of them, Table 12)."""

    copies: int = 16
    of: ClassVar[str] = "audio"

    def count(self, inputs: "AudioInputs") -> int:
        return self.copies

    def draw(
        self, samples: np.ndarray, inputs: "AudioInputs", rng: np.random.Generator, device: str
    ) -> np.ndarray:
        """Return the copies in the encoder's units, (V, T, F) float32."""
        return inputs.scaled(self.noisy(inputs.front.bank(samples), rng))

    def noisy(self, bank: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return noisy copies of a filter bank (T, F), each shifted in time: (V, T, F) float32.

        c + x1 x2 / 10 with x1 uniform in [0, 1) for every cell and x2 uniform in [0, 1) for a whole
        copy; then rolled by -10 to 9 frames, the published code's reading of the discrete U(-10,
        10).
        """
        x2, shifts = rng.random(self.copies), rng.integers(-10, 10, self.copies)
        x1 = rng.random((self.copies, *bank.shape), np.float32)
        noisy = bank + x1 * (x2[:, None, None] / 10).astype(np.float32)
        return np.stack([np.roll(copy, shift, axis=0) for copy, shift in zip(noisy, shifts)])


SIMCLR = SimCLR(views=Noise(), dim=768, negatives=64, negative_views=2)  # Table 12


@dataclass(frozen=True)
class AudioInputs(Inputs):
    """Say what sounds an encoder takes: filter banks of its ``front`` end.

    ``front.bank`` maps samples (n,) to natural logarithms (T, F), ``front.scale`` gives the mean
    and the divisor for T frames; ``front.bins`` is F, ``front.name`` identifies it in store keys.
    """

    front: Any
    kind: ClassVar[str] = "audio"

    def decode(self, item, name: str) -> np.ndarray:
        return decode(item, name)

    def content(self, samples: np.ndarray) -> bytes:
        return np.ascontiguousarray(samples, np.float32).tobytes()

    def whole(self, samples: np.ndarray) -> np.ndarray:
        """Return the clip's own filter bank in the encoder's units, (1, T, F) float32."""
        return self.scaled(self.front.bank(samples)[None])

    def scaled(self, banks: np.ndarray) -> np.ndarray:
        """Return filter banks (..., T, F) in the encoder's own units, float32."""
        mean, divisor = self.front.scale(banks.shape[-2])
        return ((banks - mean) / divisor).astype(np.float32)

    def finish(self, batch: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return batch.to(dtype)

    def stack(self, items: Sequence[np.ndarray]) -> torch.Tensor:
        """Join the items of a batch, (B, V, T, F); raises ValueError where lengths differ."""
        if len({item.shape for item in items}) > 1:
            raise ValueError("clips of different lengths; see audio.fit_length(clip, seconds)")
        return super().stack(items)

    def at_once(self, views: int, device: str) -> int:
        return (16 if device == "cpu" else 512) // views

    def blank(self, device: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(1, 128, self.front.bins, device=device, dtype=dtype)

    def identity(self) -> list:
        return [self.front.name]


def decode(item, name: str = "sound") -> np.ndarray:
    """Return a float32 waveform (n,) at 16 kHz.

    Accepts a path or the bytes of an audio file (WAV, FLAC, Ogg), or a waveform at 16 kHz, (n,),
    (channels, n) or (n, channels): the shorter axis is the channels. They are averaged, other rates
    resampled (polyphase). Raises ValueError, in one line, for what cannot be read.
    """
    if isinstance(item, (np.ndarray, torch.Tensor)):
        mono, rate = _averaged(item, name), RATE
    elif isinstance(item, (str, Path, bytes)):
        samples, rate = _read(item, name)  # (n, channels)
        mono = samples.mean(1)
    else:
        kind = type(item).__name__
        raise ValueError(f"{name} is a {kind}; accepted: a path, bytes of a file, a waveform")
    if not mono.size:
        raise ValueError(f"{name} holds no samples")
    if not np.isfinite(mono).all():
        raise ValueError(f"{name} holds samples that are not finite")
    if rate != RATE:
        mono = resample_poly(mono, RATE, rate)
    return np.ascontiguousarray(mono, np.float32)


def _averaged(item: np.ndarray | torch.Tensor, name: str) -> np.ndarray:
    """Return the mean over the channels of a waveform, (n,)."""
    if isinstance(item, torch.Tensor):
        item = item.detach().cpu()
        item = (item.float() if item.is_floating_point() else item).numpy()  # NumPy has no bf16
    channels = min(item.shape) if item.ndim == 2 else 1
    floating = np.issubdtype(item.dtype, np.floating)
    if item.ndim not in (1, 2) or channels > _CHANNELS or not floating:
        raise ValueError(
            f"{name} is a {item.dtype} array of shape {item.shape}; a waveform is float (n,), "
            f"(channels, n) or (n, channels) at 16 kHz, of at most {_CHANNELS} channels"
        )
    return item.mean(int(np.argmin(item.shape))) if item.ndim == 2 else item


def _read(item: str | Path | bytes, name: str) -> tuple[np.ndarray, int]:
    """Read an audio file, or its bytes, with soundfile: samples and their rate in Hz."""
    try:
        import soundfile  # here: images and texts need no audio library
    except ImportError:
        raise OSError("audio files need soundfile: pip install 'fungi_core[audio]'") from None
    source = io.BytesIO(item) if isinstance(item, bytes) else os.fsencode(item)
    where = name if isinstance(item, bytes) else readable(item)
    try:
        return soundfile.read(source, dtype="float32", always_2d=True)
    # A headerless name such as x.raw is a TypeError.
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        raise ValueError(f"cannot read the sound {where}: {one_line(error)}") from error


def fit_length(samples: np.ndarray, seconds: float) -> np.ndarray:
    """Cut a waveform at 16 kHz to ``seconds``, or pad it with silence."""
    n = round(seconds * RATE)
    return np.pad(samples[:n], (0, max(0, n - len(samples))))

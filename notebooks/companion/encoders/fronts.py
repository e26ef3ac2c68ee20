"""Front ends of the audio encoders: filter banks in natural logarithms, by ``transformers``."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fungi_core.audio import RATE

WINDOW, HOP = 400, 160  # samples: 25 ms windows every 10 ms
LN10 = math.log(10)

# SSAST's input: (mean, standard deviation) of the data set's filter bank by its length in frames,
# as SSAST prints and the paper's code uses them: ESC-50 (5 s), SpeechCommands V2 (1 s); any other
# length takes AudioSet's.
SSAST_INPUT = {512: (-6.6268077, 5.358466), 128: (-6.845978, 5.5654526)}
SSAST_OTHER = (-4.2677393, 4.5689974)


@dataclass(frozen=True)
class Front:
    """Hold a front end: ``bank`` maps (n,) to (T, F), ``scale`` gives mean and divisor for T
    frames.
    """

    name: str
    bank: Callable[[np.ndarray], np.ndarray]
    bins: int
    scale: Callable[[int], tuple[float, float]]


def whisper_bank(samples: np.ndarray) -> np.ndarray:
    """Return Whisper's filter bank at the clip's own length, (n // 160, 80) float32.

    Windows are centred, the mel scale is Slaney's, and nothing is more than 80 dB below the clip's
    loudest band. Raises ValueError for a clip shorter than half a window.
    """
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    if len(samples) <= WINDOW // 2:
        short = f"a sound of {len(samples)} samples is too short"
        raise ValueError(f"{short}; whisper's windows need {WINDOW // 2 + 1}")
    filters = mel_filter_bank(201, 80, 0, RATE / 2, RATE, norm="slaney", mel_scale="slaney")
    bank = spectrogram(
        samples,
        window_function(WINDOW, "hann"),
        WINDOW,
        HOP,
        power=2.0,
        mel_filters=filters,
        mel_floor=1e-10,
        log_mel="log",
    )
    bank = bank[:, :-1].T  # (80, 1 + T) -> (T, 80)
    return np.maximum(bank, bank.max() - 8 * LN10).astype(np.float32)


def kaldi_bank(samples: np.ndarray) -> np.ndarray:
    """Return Kaldi's filter bank as SSAST calls it, (T, 128) float32.

    Windows lie inside the clip, each without its mean, pre-emphasised by 0.97, times a symmetric
    Hann window, with a 512 point FFT. Zeros follow up to the next power of two: SSAST's 512 frames
    for 5 s and 128 for 1 s (its ``target_length``). Raises ValueError for less than one window.
    """
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    if len(samples) < WINDOW:
        short = f"a sound of {len(samples)} samples is too short"
        raise ValueError(f"{short}; Kaldi's windows need {WINDOW}")
    filters = mel_filter_bank(
        257, 128, 20, RATE / 2, RATE, mel_scale="kaldi", triangularize_in_mel_space=True
    )
    bank = spectrogram(
        samples - samples.mean(),
        window_function(WINDOW, "hann", periodic=False),
        WINDOW,
        HOP,
        fft_length=512,
        power=2.0,
        center=False,
        preemphasis=0.97,
        mel_filters=filters,
        mel_floor=float(np.finfo(np.float32).eps),
        log_mel="log",
        remove_dc_offset=True,
    ).T  # (T, 128)
    frames = 1 << (len(bank) - 1).bit_length()
    return np.pad(bank, ((0, frames - len(bank)), (0, 0))).astype(np.float32)


def whisper_scale(frames: int) -> tuple[float, float]:
    """Return what makes Whisper's (log10 + 4) / 4 of natural logarithms."""
    return -4 * LN10, 4 * LN10


def image_scale(frames: int) -> tuple[float, float]:
    """Return what makes 80 dB around 40 dB below full power fill the +-2 of normalised pixels."""
    return -2 * LN10, 2 * LN10


def ssast_scale(frames: int) -> tuple[float, float]:
    """Return SSAST's mean and twice its deviation for a filter bank of so many frames."""
    mean, deviation = SSAST_INPUT.get(frames, SSAST_OTHER)
    return mean, 2 * deviation


FRONTS = {
    "whisper": Front("whisper", whisper_bank, 80, whisper_scale),
    "ssast": Front("ssast", kaldi_bank, 128, ssast_scale),
    "image": Front("image", whisper_bank, 80, image_scale),  # an image network shown spectrograms
}

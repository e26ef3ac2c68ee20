"""Front ends of the audio encoders: filter banks in natural logarithms, by ``transformers``."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from fungi_core.audio import RATE

WINDOW, HOP = 400, 160  # samples: 25 ms windows every 10 ms
LN10 = math.log(10)


@dataclass(frozen=True)
class Front:
    """Hold a front end: ``bank`` maps (n,) to (T, ``bins``) in natural logarithms.

    ``units`` is the mean and divisor that make the encoder's own units of them, ``by_length`` those
    of banks of some numbers of frames T.
    """

    name: str
    bank: Callable[[np.ndarray], np.ndarray]
    bins: int
    units: tuple[float, float]
    by_length: dict[int, tuple[float, float]] = field(default_factory=dict, hash=False)

    def scale(self, frames: int) -> tuple[float, float]:
        """Return mean and divisor for so many frames."""
        return self.by_length.get(frames, self.units)


def log_mel(
    samples: np.ndarray, least: int, periodic: bool, bands: tuple, mel: dict, **how
) -> np.ndarray:
    """Return the natural logarithms of a clip's mel bands, (T, F), by `transformers.audio_utils`.

    ``periodic``: of the Hann window. ``bands`` (FFT bins, F, lowest Hz) and ``mel`` go to its
    ``mel_filter_bank``, ``how`` to its ``spectrogram``. Raises ValueError for fewer samples than
    ``least``, which one window needs.
    """
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    if len(samples) < least:
        raise ValueError(f"a sound of {len(samples)} samples is too short; a window needs {least}")
    filters = mel_filter_bank(*bands, RATE / 2, RATE, **mel)
    window = window_function(WINDOW, "hann", periodic=periodic)
    how |= dict(power=2.0, mel_filters=filters, log_mel="log")
    return spectrogram(samples, window, WINDOW, HOP, **how).T


def whisper_bank(samples: np.ndarray) -> np.ndarray:
    """Return Whisper's filter bank at the clip's own length, (n // 160, 80) float32.

    Windows are centred, the mel scale is Slaney's, and nothing is more than 80 dB below the clip's
    loudest band. Raises ValueError for a clip of no more than half a window.
    """
    mel = dict(norm="slaney", mel_scale="slaney")
    bank = log_mel(samples, WINDOW // 2 + 1, True, (201, 80, 0), mel, mel_floor=1e-10)[:-1]
    return np.maximum(bank, bank.max() - 8 * LN10).astype(np.float32)


def kaldi_bank(samples: np.ndarray) -> np.ndarray:
    """Return Kaldi's filter bank as SSAST calls it, (T, 128) float32.

    Windows lie inside the clip, each without its mean, pre-emphasised by 0.97, times a symmetric
    Hann window, with a 512 point FFT. Zeros follow up to the next power of two: SSAST's 512 frames
    for 5 s and 128 for 1 s (its ``target_length``). Raises ValueError for less than one window.
    """
    mel = dict(mel_scale="kaldi", triangularize_in_mel_space=True)
    how = dict(fft_length=512, center=False, preemphasis=0.97, remove_dc_offset=True)
    how["mel_floor"] = float(np.finfo(np.float32).eps)
    bank = log_mel(samples - samples.mean(), WINDOW, False, (257, 128, 20), mel, **how)
    frames = 1 << (len(bank) - 1).bit_length()
    return np.pad(bank, ((0, frames - len(bank)), (0, 0))).astype(np.float32)


# Mean and deviation of a data set's filter bank, as SSAST prints and the paper's code uses them:
# ESC-50's by its 512 frames (5 s), SpeechCommands V2's by 128 (1 s), for other lengths AudioSet's.
SSAST = {512: (-6.6268077, 2 * 5.358466), 128: (-6.845978, 2 * 5.5654526)}
FRONTS = {
    # (log10 + 4) / 4
    "whisper": Front("whisper", whisper_bank, 80, (-4 * LN10, 4 * LN10)),
    "ssast": Front("ssast", kaldi_bank, 128, (-4.2677393, 2 * 4.5689974), SSAST),
    # an image network: 80 dB around 40 dB below full power fill the +-2 of normalised pixels
    "image": Front("image", whisper_bank, 80, (-2 * LN10, 2 * LN10)),
}

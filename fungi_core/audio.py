"""Sounds: decoding, log-mel filter banks, and the noise views of eq. 7.

A clip is a float32 waveform (n,) at 16 kHz. A front end turns it into a filter bank in natural
logarithms, (T, F): T frames of 10 ms, F mel bands; `scaled` then brings that to the range an
encoder was trained with. Views are made in between, of the filter bank itself, as eq. 7 is printed
and the published code does it.
"""

import hashlib
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.signal import resample_poly

from fungi_core.views import generator

EXTRA = "pip install 'fungi_core[audio]'"
RATE = 16_000  # Hz
WINDOW, HOP = 400, 160  # samples: 25 ms windows every 10 ms
LN10 = math.log(10)

# SSAST's input: (mean, standard deviation) of the data set's filter bank by its length in frames,
# as SSAST prints and
# the paper's code uses them: ESC-50 (5 s), SpeechCommands V2 (1 s); any other length takes
# AudioSet's.
SSAST_INPUT = {512: (-6.6268077, 5.358466), 128: (-6.845978, 5.5654526)}
SSAST_OTHER = (-4.2677393, 4.5689974)


@dataclass(frozen=True)
class Front:
    """What an encoder hears: ``bank`` maps a waveform (n,) to (T, F) float32 natural logarithms,
    ``scale`` gives the mean and divisor for T frames.
    """

    name: str
    bank: Callable[[np.ndarray], np.ndarray]
    bins: int
    scale: Callable[[int], tuple[float, float]]


def decode(item, name: str = "sound") -> np.ndarray:
    """A float32 waveform (n,) at 16 kHz: a path or bytes of an audio file (WAV, FLAC, Ogg), or a
    waveform at 16 kHz, (n,) or (n, channels), as it is.

    Channels are averaged, other rates resampled (polyphase). Raises ValueError, in one line, for
    what cannot be read.
    """
    if isinstance(item, (np.ndarray, torch.Tensor)):
        samples, rate = np.asarray(item), RATE
        if samples.ndim not in (1, 2) or not np.issubdtype(samples.dtype, np.floating):
            raise ValueError(
                f"{name} is a {samples.dtype} array of shape {samples.shape}; a waveform is float (n,) or "
                "(n, channels) at 16 kHz"
            )
    elif isinstance(item, (str, Path, bytes)):
        samples, rate = _read(item, name)
    else:
        raise ValueError(
            f"{name} is a {type(item).__name__}; accepted: a path, bytes of an audio file, a waveform"
        )
    mono = samples.mean(1) if samples.ndim == 2 else samples
    if not mono.size or not np.isfinite(mono).all():
        raise ValueError(
            f"{name} {'holds no samples' if not mono.size else 'holds samples that are not finite'}"
        )
    if rate != RATE:
        common = math.gcd(rate, RATE)
        mono = resample_poly(mono, RATE // common, rate // common)
    return np.ascontiguousarray(mono, np.float32)


def _read(item: str | Path | bytes, name: str) -> tuple[np.ndarray, int]:
    try:
        import soundfile  # here: image notebooks need no audio library
    except ImportError:
        raise OSError(f"audio files need soundfile: {EXTRA}") from None
    where = name if isinstance(item, bytes) else item
    try:
        return soundfile.read(
            io.BytesIO(item) if isinstance(item, bytes) else item, dtype="float32"
        )
    except (
        soundfile.SoundFileError,
        OSError,
        TypeError,
    ) as error:  # TypeError: headerless names such as x.raw
        raise ValueError(" ".join(f"cannot read the sound {where}: {error}".split())) from error


def fit_length(samples: np.ndarray, seconds: float) -> np.ndarray:
    """The first ``seconds`` of a waveform at 16 kHz, silence behind a shorter one. (n,) -> (16000 *
    seconds,).
    """
    n = round(seconds * RATE)
    return np.pad(samples[:n], (0, max(0, n - len(samples))))


def sound_id(samples: np.ndarray) -> str:
    """Content hash of a waveform: what its views are seeded with."""
    return hashlib.blake2b(
        np.ascontiguousarray(samples, np.float32).tobytes(), digest_size=8
    ).hexdigest()


def whisper_bank(samples: np.ndarray) -> np.ndarray:
    """Whisper's filter bank at the clip's own length, (n // 160, 80): centred windows, Slaney's mel
    scale, and nothing more than 80 dB below the clip's loudest band.
    """
    if len(samples) <= WINDOW // 2:
        raise ValueError(
            f"a sound of {len(samples)} samples is too short; whisper's windows need {WINDOW // 2 + 1}"
        )
    window = torch.hann_window(WINDOW)
    spectrum = torch.stft(
        torch.from_numpy(samples), WINDOW, HOP, window=window, return_complex=True
    )  # (201, 1 + T)
    power = spectrum[:, :-1].abs().square().T  # (T, 201)
    bank = (power @ slaney_filters(80)).clamp_min(1e-10).log()
    return bank.clamp_min(bank.max() - 8 * LN10).numpy()


def kaldi_bank(samples: np.ndarray) -> np.ndarray:
    """Kaldi's filter bank as SSAST calls it, (T, 128): windows inside the clip, each without its
    mean, pre-emphasised by 0.97, times a symmetric Hann window, 512 point FFT; zeros behind the
    last frame up to the next power of two.

    That padding is SSAST's 512 frames for 5 s and 128 for 1 s (its ``target_length``).
    """
    if len(samples) < WINDOW:
        raise ValueError(
            f"a sound of {len(samples)} samples is too short; Kaldi's windows need {WINDOW}"
        )
    frames = torch.from_numpy(samples - samples.mean()).unfold(0, WINDOW, HOP)  # (T, 400)
    frames = frames - frames.mean(1, keepdim=True)
    frames = frames - 0.97 * torch.cat([frames[:, :1], frames[:, :-1]], 1)
    power = (
        torch.fft.rfft(frames * torch.hann_window(WINDOW, periodic=False), 512).abs().square()
    )  # (T, 257)
    bank = (power @ kaldi_filters(128)).clamp_min(torch.finfo(torch.float32).eps).log()
    return F.pad(bank, (0, 0, 0, (1 << (len(bank) - 1).bit_length()) - len(bank))).numpy()


@cache
def slaney_filters(bins: int) -> torch.Tensor:
    """Triangles of unit area over 0 to 8 kHz, evenly spaced on Slaney's mel scale (linear to 1 kHz,
    then logarithmic). (201, bins) float32.
    """
    knee, step = 1000 / (200 / 3), math.log(6.4) / 27  # the knee in mel
    top = knee + math.log(RATE / 2 / 1000) / step
    mel = np.linspace(0, top, bins + 2)
    hertz = np.where(mel < knee, mel * 200 / 3, 1000 * np.exp(step * (mel - knee)))
    triangles = _triangles(np.fft.rfftfreq(WINDOW, 1 / RATE), hertz)
    return torch.from_numpy(triangles * 2 / (hertz[2:] - hertz[:-2])).float()


@cache
def kaldi_filters(bins: int) -> torch.Tensor:
    """Triangles of unit height over 20 Hz to 8 kHz, straight and evenly spaced on the mel scale
    1127 ln(1 + f / 700). (257, bins) float32; Kaldi leaves the highest frequency out.
    """
    mel = lambda hertz: 1127 * np.log1p(np.asarray(hertz) / 700)
    triangles = _triangles(
        mel(np.fft.rfftfreq(512, 1 / RATE)), np.linspace(mel(20), mel(RATE / 2), bins + 2)
    )
    triangles[-1] = 0
    return torch.from_numpy(triangles).float()


def _triangles(at: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Triangle i rises from corner i to 1 at corner i + 1 and falls to corner i + 2; (len(at),
    len(corners) - 2).
    """
    low, middle, high = corners[:-2], corners[1:-1], corners[2:]
    rise, fall = (at[:, None] - low) / (middle - low), (high - at[:, None]) / (high - middle)
    return np.maximum(0, np.minimum(rise, fall))


def noisy(bank: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Eq. 7: ``count`` noisy copies of a filter bank (T, F), each shifted in time, (count, T, F)
    float32.

    c + x1 x2 / 10 with x1 uniform in [0, 1) for every cell and x2 uniform in [0, 1) for a whole
    copy; then rolled by -10 to 9 frames, the published code's reading of the discrete U(-10, 10).
    What leaves one end comes in at the other.
    """
    x2, shifts = rng.random(count), rng.integers(-10, 10, count)
    x1 = rng.random((count, *bank.shape), np.float32)
    copies = bank + x1 * (x2[:, None, None] / 10).astype(np.float32)
    return np.stack([np.roll(copy, shift, axis=0) for copy, shift in zip(copies, shifts)])


def scaled(bank: np.ndarray, front: Front) -> np.ndarray:
    """(..., T, F) filter banks in the encoder's own units."""
    mean, divisor = front.scale(bank.shape[-2])
    return ((bank - mean) / divisor).astype(np.float32)


def _ssast_scale(frames: int) -> tuple[float, float]:
    mean, deviation = SSAST_INPUT.get(frames, SSAST_OTHER)
    return mean, 2 * deviation


FRONTS = {
    front.name: front
    for front in (
        Front(
            "whisper", whisper_bank, 80, lambda frames: (-4 * LN10, 4 * LN10)
        ),  # its (log10 + 4) / 4
        Front("ssast", kaldi_bank, 128, _ssast_scale),
        # for image networks: 80 dB around 40 dB below full power fill the +-2 of their normalised
        # pixels
        Front("image", whisper_bank, 80, lambda frames: (-2 * LN10, 2 * LN10)),
    )
}


# What `fungi` asks of every modality; see also `views`.


def view_count(backbone, objective) -> int:
    """Views a clip: 1 for KL, 16 for SimCLR (Table 12)."""
    if objective.views == "whole":
        return 1
    if not getattr(objective, "positives", 0):
        raise ValueError(
            f"{objective.name} with these settings has no views of a sound; there are "
            "objectives.by_name('kl', 'audio') and by_name('simclr', 'audio')"
        )
    return objective.positives


def at_once(backbone, count: int) -> int:
    """Clips of ``count`` views that make a good batch."""
    return (16 if backbone.device == "cpu" else 512) // count


def item_views(backbone, objective, item, seed: int, name: str) -> np.ndarray:
    """What one clip contributes to a batch, (V, T, F) float32: its filter bank, or noise views of
    it (eq. 7) keyed by seed, objective and the clip's content.
    """
    samples = decode(item, name)
    bank = backbone.front.bank(samples)
    if objective.views == "whole":
        return scaled(bank[None], backbone.front)
    rng = generator(seed, objective.name, sound_id(samples))
    return scaled(noisy(bank, objective.positives, rng), backbone.front)


def stack(backbone, items: Sequence[np.ndarray]) -> torch.Tensor:
    """The items of a batch in one tensor (B, V, T, F)."""
    if len({item.shape for item in items}) > 1:
        raise ValueError(
            "clips of different lengths; bring them to one length with sounds.fit_length(clip, seconds)"
        )
    return torch.from_numpy(np.stack(items))


def finished(backbone, objective, batch: torch.Tensor) -> torch.Tensor:
    """Filter banks need nothing more on the device than its dtype."""
    return batch.to(backbone.dtype)


def identity(backbone) -> list:
    """What of the backbone's input changes a feature, for the store's keys."""
    return [backbone.front.name]

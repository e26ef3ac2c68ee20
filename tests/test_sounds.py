"""Sounds: filter banks against transformers' and a loop, eq. 7 by hand, decoding of formats, rates
and broken files.
"""

import io
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from companion.encoders import spectrograms
from companion.encoders.fronts import FRONTS, kaldi_bank, whisper_bank
from fungi_core import DINO, KL, Fungi
from fungi_core import audio as sounds
from fungi_core.audio import SIMCLR, AudioInputs, Noise
from fungi_core.backbones import freeze
from fungi_core.rows import view_batches
from fungi_core.seeds import content_id, generator

soundfile = pytest.importorskip("soundfile")


def clip(seconds=1.0, seed=0):
    rng = generator("test clip", seed)
    t = np.arange(round(seconds * sounds.RATE)) / sounds.RATE
    wave = 0.3 * np.sin(2 * np.pi * (300 + 900 * t) * t) + 0.05 * rng.standard_normal(len(t)) + 0.01
    return wave.astype(np.float32)


def test_whisper_bank_is_transformers():
    transformers = pytest.importorskip("transformers")
    for seconds in (1.0, 0.73, 5.0):
        x = clip(seconds)
        theirs = (
            transformers.WhisperFeatureExtractor(feature_size=80)
            ._np_extract_fbank_features(x[None], "cpu")[0]
            .T
        )
        ours = AudioInputs(FRONTS["whisper"]).scaled(whisper_bank(x))
        assert ours.shape == theirs.shape == (len(x) // 160, 80)
        np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_whisper_bank_of_the_padded_clip_agrees_inside():
    """Whisper itself hears 30 s; inside the clip its own length changes nothing but the last
    window.
    """
    x = clip(1.0)
    long = np.pad(x, (0, 2 * sounds.RATE))
    np.testing.assert_allclose(whisper_bank(long)[:98], whisper_bank(x)[:98], atol=1e-4)


def test_kaldi_bank_is_transformers_ast():
    transformers = pytest.importorskip("transformers")
    from transformers.models.audio_spectrogram_transformer import (
        feature_extraction_audio_spectrogram_transformer as ast,
    )

    if ast.is_speech_available():
        pytest.skip(
            "torchaudio is installed: transformers takes it, and the test wants its numpy version"
        )
    x = clip(1.0)
    theirs = transformers.ASTFeatureExtractor(do_normalize=False, max_length=128)(
        x - x.mean(), sampling_rate=16000
    )
    ours = kaldi_bank(x)
    assert ours.shape == (128, 128) and (ours[98:] == 0).all()
    np.testing.assert_allclose(ours[:98], np.asarray(theirs["input_values"][0])[:98], atol=2e-3)


def slow_kaldi(x, bins=128):
    """Frame by frame and bin by bin, from Kaldi's definition, in float64."""
    x = x.astype(np.float64) - x.astype(np.float64).mean()
    mel = lambda f: 1127 * np.log(1 + f / 700)
    width = (mel(8000) - mel(20)) / (bins + 1)
    out = []
    for start in range(0, len(x) - 400 + 1, 160):
        frame = x[start : start + 400] - x[start : start + 400].mean()
        frame = np.array([frame[i] - 0.97 * frame[max(i - 1, 0)] for i in range(400)])
        frame *= [0.5 - 0.5 * np.cos(2 * np.pi * i / 399) for i in range(400)]
        power = np.abs(np.fft.fft(frame, 512)) ** 2
        row = []
        for b in range(bins):
            left = mel(20) + b * width
            total = 0.0
            for k in range(256):
                m = mel(k * 16000 / 512)
                total += power[k] * max(
                    0.0, min((m - left) / width, (left + 2 * width - m) / width)
                )
            row.append(np.log(max(total, np.finfo(np.float32).eps)))
        out.append(row)
    return np.array(out)


def test_kaldi_bank_is_the_definition():
    x = clip(0.07)
    ours = kaldi_bank(x)
    np.testing.assert_allclose(ours[:5], slow_kaldi(x), atol=5e-3)
    assert ours.shape == (8, 128)  # 5 frames, zeros behind


def test_ssast_input_lengths_and_statistics():
    assert kaldi_bank(clip(5.0)).shape == (512, 128)  # SSAST's target_length for ESC-50
    assert kaldi_bank(clip(1.0)).shape == (128, 128)  # and for SpeechCommands
    esc = AudioInputs(FRONTS["ssast"]).scaled(np.zeros((512, 128), np.float32))
    np.testing.assert_allclose(esc, 6.6268077 / (2 * 5.358466), rtol=1e-6)
    words = AudioInputs(FRONTS["ssast"]).scaled(np.zeros((128, 128), np.float32))
    np.testing.assert_allclose(words, 6.845978 / (2 * 5.5654526), rtol=1e-6)


class Given:
    """A generator whose draws are written down."""

    def __init__(self, x2, shifts, x1):
        self.draws, self.shifts = [np.array(x2), np.array(x1, np.float32)], np.array(shifts)

    def random(self, size, dtype=None):
        draw = self.draws.pop(0)
        assert draw.shape == (size if isinstance(size, tuple) else (size,))
        return draw

    def integers(self, low, high, size):
        assert (low, high, size) == (-10, 10, len(self.shifts))
        return self.shifts


def test_equation_7_by_hand():
    bank = np.array([[1, 2], [3, 4], [5, 6]], np.float32)  # 3 frames, 2 bands
    x1 = [[[0, 0.5], [1, 0], [0.5, 0.5]], [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]]
    got = Noise(2).noisy(bank, Given([0.4, 1.0], [1, -1], x1))
    # 0.4 / 10 = 0.04 a cell, last frame comes first; 1.0 / 10 = 0.1 a cell, first frame goes last
    hand = [[[5.02, 6.02], [1, 2.02], [3.04, 4]], [[3.03, 4.04], [5.05, 6.06], [1.01, 2.02]]]
    np.testing.assert_allclose(got, hand, rtol=1e-6)


def test_noise_views_follow_their_distribution():
    bank = (
        np.arange(60, dtype=np.float32)[:, None].repeat(4, 1) * 10
    )  # frames 10 apart: noise cannot hide the shift
    got = Noise(4000).noisy(bank, generator("noise", 0))
    start = np.rint(got[:, 0, 0] / 10)  # the frame that came first
    shift = np.where(start > 30, 60 - start, -start)
    assert set(shift) == set(range(-10, 10))
    noise = np.stack([np.roll(g, -int(s), 0) for g, s in zip(got, shift)]) - bank
    assert noise.min() >= -1e-4 and noise.max() <= 0.1
    assert abs(noise.mean() - 0.025) < 0.001  # E x1 E x2 / 10
    assert noise.mean((1, 2)).std() > 0.01  # one x2 a copy, not one a cell


@pytest.fixture(scope="module")
def whisper():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = spectrograms.whisper()
    inputs = AudioInputs(FRONTS["whisper"])
    return freeze(model, "whisper", inputs, device="cpu", dtype="float32")


def item_views(encoder, objective, x, seed=0):
    """What one clip contributes to a batch."""
    samples = encoder.inputs.decode(x, "clip 0")
    rng = generator(seed, objective.name, content_id(encoder.inputs.content(samples)))
    return objective.views.draw(samples, encoder.inputs, rng, "cpu")


def test_views_are_seeded_by_content(whisper):
    made = lambda x, objective, seed=0: item_views(whisper, objective, x, seed)
    a, once = clip(), made(clip(), SIMCLR)
    assert once.shape == (16, 100, 80) and once.dtype == np.float32
    np.testing.assert_array_equal(
        once, made(encoded(a, 16000, format="WAV", subtype="FLOAT"), SIMCLR)
    )
    assert not np.array_equal(once, made(a, SIMCLR, 1))
    whole = made(a, KL())
    assert whole.shape == (1, 100, 80)
    np.testing.assert_array_equal(whole, made(a, KL(), 7))
    # louder by a factor: the same bank but for a constant, other noise
    louder = made(2 * a, SIMCLR) - made(2 * a, KL())
    assert np.abs(louder - (once - whole)).max() > 0.01


def test_settings_of_table_12():
    kl = KL()
    assert (kl.temperature, kl.dim, kl.normalize) == (15, 768, True)
    assert (SIMCLR.views.copies, SIMCLR.negatives, SIMCLR.negative_views, SIMCLR.dim) == (
        16,
        64,
        2,
        768,
    )
    assert (SIMCLR.temperature, SIMCLR.normalize) == (0.07, False)


def test_features_do_not_depend_on_the_batch(whisper):
    """Alone, in company, reordered; negatives are two views each of the training clips."""
    pair = [KL(dim=24), replace(SIMCLR, views=Noise(3), negatives=4, dim=24)]
    x = [clip(seed=i) for i in range(5)]
    fitted = Fungi(whisper, pair, pca=None).fit(x)
    assert fitted.parts_["simclr"].negatives.shape == (8, 24)
    together = fitted.transform(x)
    np.testing.assert_allclose(fitted.transform(x[3:4])[0], together[3], atol=1e-5)
    np.testing.assert_allclose(fitted.transform(x[::-1])[::-1], together, atol=1e-5)
    assert together.shape == (5, 3 * 384)


def test_a_clip_that_is_none_is_named(whisper):
    with pytest.raises(ValueError, match="audio 1 is a list"):
        Fungi(whisper, [KL()]).fit([clip(), [1.0]])
    with pytest.raises(ValueError, match="different lengths; .* audio.fit_length"):
        Fungi(whisper, [KL()]).fit([clip(), clip(0.5)])
    with pytest.raises(ValueError, match="dino takes Crops, views of image data; .* reads audio"):
        next(view_batches(whisper, DINO().views, "dino", [clip()], 0))


def encoded(samples, rate, **kwargs):
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, **kwargs)
    return stream.getvalue()


def test_decoding_formats(tmp_path):
    x = clip()
    soundfile.write(tmp_path / "x.wav", x, 16000, subtype="FLOAT")
    np.testing.assert_array_equal(sounds.decode(tmp_path / "x.wav"), x)
    np.testing.assert_array_equal(sounds.decode(str(tmp_path / "x.wav")), x)
    np.testing.assert_allclose(sounds.decode(encoded(x, 16000, format="FLAC")), x, atol=1e-4)
    ogg = sounds.decode(encoded(x, 16000, format="OGG", subtype="OPUS"))
    assert len(ogg) == len(x) and np.corrcoef(ogg, x)[0, 1] > 0.9
    np.testing.assert_array_equal(sounds.decode(x), x)


def test_other_rates_and_channels():
    t = np.arange(44100) / 44100
    tone = np.sin(2 * np.pi * 440 * t).astype(np.float32)
    stereo = np.stack([tone, 0.5 * tone], 1)
    got = sounds.decode(encoded(stereo, 44100, format="WAV", subtype="FLOAT"))
    true = 0.75 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert got.shape == (16000,) and got.dtype == np.float32
    assert np.abs(got - true)[100:-100].max() < 2e-3
    assert len(sounds.decode(encoded(tone[:8000], 8000, format="WAV"))) == 16000


@pytest.mark.parametrize("content", [b"", b"RIFF", b"OggS" + bytes(200), b"no sound at all" * 20])
def test_broken_files_give_one_line(tmp_path, content):
    (tmp_path / "broken.wav").write_bytes(content)
    with pytest.raises(ValueError, match="cannot read the sound .*broken.wav") as caught:
        sounds.decode(tmp_path / "broken.wav")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="cannot read the sound clip 3"):
        sounds.decode(content, "clip 3")


def test_other_bad_input():
    with pytest.raises(ValueError, match="clip 0 holds no samples"):
        sounds.decode(encoded(np.zeros(0, np.float32), 16000, format="WAV"), "clip 0")
    with pytest.raises(ValueError, match="not finite"):
        sounds.decode(np.array([0.0, np.nan]))
    with pytest.raises(ValueError, match=r"int64 array of shape \(3,\)"):
        sounds.decode(np.arange(3))
    with pytest.raises(ValueError, match="is a list; accepted"):
        sounds.decode([1.0])
    with pytest.raises(ValueError, match="cannot read the sound .*nowhere.wav"):
        sounds.decode("nowhere.wav")
    for bank in (whisper_bank, kaldi_bank):
        with pytest.raises(ValueError, match="too short"):
            bank(np.zeros(150, np.float32))


def test_fit_length():
    x = clip(0.5)
    long = sounds.fit_length(x, 1)
    assert len(long) == 16000 and (long[8000:] == 0).all()
    np.testing.assert_array_equal(sounds.fit_length(x, 0.25), x[:4000])


def test_missing_soundfile_gives_one_line():
    code = "import sys; sys.modules['soundfile'] = None\n"
    code += "from fungi_core import audio\naudio.decode('x.wav')"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "OSError: audio files need soundfile: pip install 'fungi_core[audio]'" in ran.stderr


def test_images_and_made_sounds_need_no_audio_library():
    code = """
import sys
# importing them fails
sys.modules.update(dict.fromkeys(("soundfile", "pyarrow", "transformers", "torchaudio")))
from companion import explore, features, protocol, studies
from companion.data import datasets
from companion.encoders.loading import load
from companion.figures import grids, plots
datasets.load("digits", "test"), datasets.load("synthetic_sounds", "test")[0]
print(load("vit_micro.sup_tin100").width)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "128"

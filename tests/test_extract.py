"""From a data set's name to rows in the store: extracted once, resumed, keyed by what changes them."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import shrink_test_vit

from companion.data import datasets
from companion.evaluate import knn as evaluate
from fungi_core import backbones, extract, fungi, pca, projection, store, views
from fungi_core import objectives as O
from fungi_core.extract import features, fungi_features

NAME = "random:test_vit"
SMALL = (O.KL(dim=32), O.DINO(dim=24, local_crops=2), O.SimCLR(dim=16, negatives=3, stride_scale=2))
KL = SMALL[:1]


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """An empty store, and the test network at 32 px."""
    monkeypatch.setenv("FUNGI_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(backbones, "auto_dtype", lambda device: torch.float32)
    monkeypatch.setattr(backbones, "auto_device", lambda: "cpu")
    shrink_test_vit(monkeypatch)
    return tmp_path / "store"


def digits(names=SMALL, n_train=12, n_test=8, backbone=NAME, **settings):
    return features("digits", backbone, names, n_train=n_train, n_test=n_test, **settings)


def contents(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.suffix in (".npy", ".json")
    }


def forbid(monkeypatch):
    stop = lambda *_args, **_kwargs: pytest.fail("something was extracted")
    monkeypatch.setattr(fungi, "rows", stop)
    monkeypatch.setattr(fungi, "negative_latents", stop)


def test_rows_are_those_of_the_transformer():
    train, test = digits(seed=3)
    assert (len(train.data), len(test.data)) == (
        12,
        8,
    ) and train.labels.tolist() == train.data.labels.tolist()
    assert list(train.blocks) == ["embedding", "kl", "dino", "simclr"]
    assert all(
        block.shape == (12, 64) and block.dtype == np.float32 for block in train.blocks.values()
    )
    one = fungi.Fungi(NAME, SMALL, pca=None, seed=3, device="cpu", dtype="float32").fit(train.data)
    for rows in (train, test):
        expected = one.extract(rows.data)
        for name, block in rows.blocks.items():
            np.testing.assert_allclose(
                block, expected[name], rtol=0, atol=1e-5 * np.abs(block).max()
            )
    some = train.take(np.array([3, 1]))
    assert some.labels.tolist() == train.labels[[3, 1]].tolist()
    np.testing.assert_array_equal(some.blocks["dino"], train.blocks["dino"][[3, 1]])


def test_a_second_call_extracts_nothing(monkeypatch, workplace):
    first, before = digits(), contents(workplace)
    forbid(monkeypatch)
    second = digits()
    for a, b in zip(first, second, strict=True):
        assert a.store_keys == b.store_keys
        for name in a.blocks:
            np.testing.assert_array_equal(a.blocks[name], b.blocks[name])
    digits(())  # parts of it neither
    digits(SMALL[1:])
    assert contents(workplace) == before


@pytest.mark.parametrize("stop_at", range(3), ids=[o.name for o in SMALL])
def test_a_resumed_run_gives_identical_bytes(stop_at, monkeypatch, tmp_path):
    """Stopped in the second batch of one objective: shards already there stay, the rest comes out
    to the bit.
    """
    monkeypatch.setenv("FUNGI_STORE", str(tmp_path / "whole"))
    digits(n_train=300)
    monkeypatch.setenv("FUNGI_STORE", str(tmp_path / "resumed"))
    intact = fungi.rows

    def stopped(backbone, objective, parts, images, *rest):
        for start, *blocks in intact(backbone, objective, parts, images, *rest):
            if objective.name == SMALL[stop_at].name and start:
                raise KeyboardInterrupt
            yield start, *blocks

    with monkeypatch.context() as patch:
        patch.setattr(fungi, "rows", stopped)
        with pytest.raises(KeyboardInterrupt):
            digits(n_train=300)
    partial, extracted = contents(tmp_path / "resumed"), []

    def counted(backbone, objective, parts, images, *rest):
        extracted.append((images.split, objective.name, len(images)))
        return intact(backbone, objective, parts, images, *rest)

    monkeypatch.setattr(fungi, "rows", counted)
    digits(n_train=300)
    assert extracted[0] == (
        "train",
        SMALL[stop_at].name,
        300 - store.SHARD,
    )  # not one row of the first shard again
    assert [name for split, name, _ in extracted if split == "train"] == [
        o.name for o in SMALL[stop_at:]
    ]
    whole = contents(tmp_path / "whole")
    assert contents(tmp_path / "resumed") == whole
    assert partial and all(whole[name] == data for name, data in partial.items())


@pytest.mark.parametrize("size", [32, 64, 96, 224])
@pytest.mark.parametrize("objective", [O.KL(), O.DINO(), O.SimCLR()], ids=lambda o: o.name)
def test_batches_end_where_shards_end(size, objective, monkeypatch):
    """Else a run resumed at a shard would see other batches, and other last bits."""
    monkeypatch.setattr(views, "to_image", lambda image, name: image)
    monkeypatch.setattr(views, "prepare", lambda *_: np.zeros((1, 1, 1, 3), np.uint8))
    monkeypatch.setattr(views, "finish", lambda stack, *_: stack)
    stub = SimpleNamespace(
        modality="image", size=size, crop_ratio=1.0, device="cpu", mean=None, std=None, dtype=None
    )
    batches = list(fungi.view_batches(stub, objective, range(600), 0))
    assert [start for start, _ in batches] == list(
        np.cumsum([0, *(len(batch) for _, batch in batches)])[:-1]
    )
    assert sum(len(batch) for _, batch in batches) == 600
    assert {0, 256, 512} <= {start for start, _ in batches}


def test_two_targets_with_different_gaps_are_extracted_once(monkeypatch, workplace):
    train, _ = digits(KL, n_train=600)
    embedding, kl = (workplace / key for key in train.store_keys)
    before = contents(workplace)
    for folder, shards in ((embedding, (0,)), (kl, (0, 256))):
        for start in shards:
            next(folder.glob(f"{start:09d}-*.npy")).unlink()
    seen, intact = [], fungi.rows
    monkeypatch.setattr(
        fungi,
        "rows",
        lambda b, o, p, images, *rest: (seen.append(len(images)), intact(b, o, p, images, *rest))[
            1
        ],
    )
    digits(KL, n_train=600)
    assert seen == [512] and contents(workplace) == before


def test_a_complete_embedding_is_not_locked_by_the_gradients_of_another_seed(monkeypatch):
    """Else all seeds of a split would wait for each other on a cluster."""
    embedding_key, kl_key = digits(KL)[0].store_keys
    locked, intact = [], store.Rows.lock
    monkeypatch.setattr(
        store.Rows, "lock", lambda rows, *part: (locked.append(rows.key), intact(rows, *part))[1]
    )
    train, test = digits(KL, seed=1)
    assert (
        locked == [train.store_keys[1], test.store_keys[1]] and embedding_key == train.store_keys[0]
    )


@pytest.mark.parametrize(
    ("ranges", "joined"),
    [
        ([], []),
        ([(256, 512), (0, 512)], [(0, 512)]),
        ([(0, 256), (256, 300), (512, 600)], [(0, 300), (512, 600)]),
        ([(0, 900), (10, 20), (30, 40)], [(0, 900)]),
    ],
)
def test_union_of_row_ranges(ranges, joined):
    assert extract._union(ranges) == joined


# --- keys


def keys(*args, **settings):
    """{(split, feature): key} of a call."""
    return {
        (rows.data.split, name): key
        for rows in digits(*args, **settings)
        for name, key in zip(rows.blocks, rows.store_keys, strict=True)
    }


def changed(a, b):
    return {place for place in a if a[place] != b[place]}


EVERY = {
    (split, name) for split in ("train", "test") for name in ("embedding", "kl", "dino", "simclr")
}
GRADIENTS = {place for place in EVERY if place[1] != "embedding"}


def test_keys_hold_all_that_changes_a_feature():
    base = keys()
    assert len(set(base.values())) == 8
    assert changed(base, keys(seed=1)) == GRADIENTS
    assert changed(base, keys(layer="blocks.4.attn.proj")) == GRADIENTS
    assert changed(base, keys(backbone=backbones.load(NAME, dtype="bfloat16"))) == EVERY
    of = lambda name: {place for place in EVERY if place[1] == name}
    for i, other in enumerate((O.KL(dim=32, temperature=1), O.DINO(dim=24, local_crops=2, local_scale=(0.1, 0.2)),
                               O.SimCLR(dim=16, negatives=3, stride_scale=2, denominator="published"))):  # fmt: skip
        assert changed(base, keys((*SMALL[:i], other, *SMALL[i + 1 :]))) == of(other.name)
    other_weights = backbones.load(NAME)
    other_weights.model.norm.bias.data[0] += 1e-3
    assert changed(base, keys(backbone=other_weights)) == EVERY
    squeezed = backbones.load(NAME)
    squeezed.crop_ratio = 0.5
    assert changed(base, keys(backbone=squeezed)) == EVERY


def test_settings_that_came_later_are_no_part_of_a_key_at_their_defaults():
    """Else every store made before them would be extracted anew."""
    encoder, data = backbones.load(NAME), digits(())[0].data
    meta_of = lambda objective: extract._meta(encoder, data, data, objective, 0, "x", "rademacher")
    metas = [meta_of(objective) for objective in SMALL]
    assert not any({"head", "augmentation"} & meta["settings"].keys() for meta in metas)
    for i, name in enumerate(("kl", "dino", "simclr")):
        meta = meta_of(replace(SMALL[i], head=False))
        assert meta["settings"]["head"] is False and meta["feature"] == name
        assert meta["settings"].keys() - metas[i]["settings"].keys() == {"head"}


def test_objectives_without_a_head_and_full_augmentation_have_stores_of_their_own():
    base = keys()
    bare = keys([replace(o, head=False) for o in SMALL])
    assert changed(base, bare) == GRADIENTS
    negatives = [e for e in store.entries() if e["meta"].get("layer") == "negatives"]
    assert sorted(entry["width"] for entry in negatives) == [
        16,
        64,
    ]  # without a head they are embeddings
    coloured = keys([SMALL[0], replace(SMALL[1], augmentation="full"), SMALL[2]])
    assert changed(base, coloured) == {("train", "dino"), ("test", "dino")}


def test_a_smaller_training_set_touches_the_test_rows_through_the_negatives_alone():
    base = keys(n_train=12)
    assert changed(base, keys(n_train=10)) == {place for place in EVERY if place[0] == "train"} | {
        ("test", "simclr")
    }


def test_keys_hold_nothing_that_does_not_change_a_feature(monkeypatch):
    base = digits()
    again = keys(tuple(reversed(SMALL)))  # the order of objectives
    assert {again[place] for place in EVERY} == {key for rows in base for key in rows.store_keys}
    assert set(keys(["kl"])) == {
        (split, name) for split in ("train", "test") for name in ("embedding", "kl")
    }
    key_of_kl = digits(KL)[0].store_keys
    monkeypatch.setenv("FUNGI_STORE", str(store.paths.store_dir()) + "-small-batches")
    monkeypatch.setattr(fungi, "view_count", lambda *_: 2**22 // (4 * 32**2))
    small_batches = digits(KL)[0]
    assert small_batches.store_keys == key_of_kl
    np.testing.assert_allclose(
        small_batches.blocks["kl"], base[0].blocks["kl"], rtol=1e-4, atol=1e-9
    )


def test_negatives_are_drawn_once_for_both_splits_and_every_layer(monkeypatch):
    calls, intact = [], fungi.negative_latents

    def counted(*args):
        calls.append(args[3].split)
        return intact(*args)

    monkeypatch.setattr(fungi, "negative_latents", counted)
    digits(SMALL[2:])
    digits(SMALL[2:], layer="blocks.4.attn.proj")
    assert calls == ["train"]
    negatives = [entry for entry in store.entries() if entry["meta"].get("layer") == "negatives"]
    assert len(negatives) == 1 and (negatives[0]["n"], negatives[0]["width"]) == (3 * 9, 16)
    digits(SMALL[2:], seed=1)
    assert calls == ["train", "train"]


def test_deepcluster_and_ibot_through_the_store(monkeypatch):
    names = [
        O.DeepCluster(dim=8, local_crops=1, images_per_cluster=4),
        O.IBOT(dim=12, local_crops=1),
    ]
    train, test = digits(names)
    assert list(test.blocks) == ["embedding", "deepcluster", "ibot"]
    assert all(np.isfinite(block).all() and block.any() for block in test.blocks.values())
    centroids = [e for e in store.entries() if e["meta"].get("layer") == "negatives"]
    assert [(entry["n"], entry["width"]) for entry in centroids] == [
        (3 * 3, 8)
    ]  # once, of the training rows
    one = fungi.Fungi(NAME, names, pca=None, device="cpu", dtype="float32").fit(train.data)
    for name, block in one.extract(test.data).items():
        np.testing.assert_allclose(
            test.blocks[name], block, rtol=0, atol=1e-5 * np.abs(block).max()
        )
    forbid(monkeypatch)
    digits(names)


# --- what can go wrong


@pytest.mark.parametrize("name", ["kl", "dino", "simclr"])
def test_a_loss_that_is_nan_leaves_nothing_half_written(name, monkeypatch, workplace):
    wanted = [o for o in SMALL if o.name == name]
    kind, intact = type(wanted[0]), type(wanted[0]).loss
    broken = lambda self, *args: (
        intact(self, *args) * torch.where(torch.arange(len(args[0])) == 5, torch.nan, 1.0)
    )
    with monkeypatch.context() as patch:
        patch.setattr(kind, "loss", broken)
        with pytest.raises(
            FloatingPointError,
            match=r"loss of digits train\[\d+\] \(\d{4}\) is nan; nothing was writ",
        ):
            digits(wanted)
    complete = [entry for entry in store.entries() if entry["done"]]
    assert all(entry["done"] == entry["n"] for entry in complete)
    assert name not in {
        entry["meta"]["feature"] for entry in complete if entry["meta"].get("layer") != "negatives"
    }
    assert not list(workplace.rglob("*.tmp"))
    train, _ = digits(wanted)  # and the same call works once the loss does
    assert np.isfinite(train.blocks[name]).all()


def test_one_name_twice_is_refused_before_it_can_mix_two_settings(workplace):
    for names in (
        ["kl", "kl"],
        ["kl", O.KL(temperature=1)],
        [O.SimCLR(stride_scale=2), O.SimCLR()],
    ):
        with pytest.raises(ValueError, match="each objective can be used once"):
            digits(names)
    assert contents(workplace) == {}


def test_unknown_names_are_one_line(workplace):
    for call in (
        lambda: digits(["byol"]),
        lambda: features("digitz", NAME),
        lambda: digits(layer="blocks.9.mlp"),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert "\n" not in str(error.value)
    assert contents(workplace) == {}


def test_the_command_writes_one_split_and_says_so(capsys, workplace):
    rows = ["--n-train", "12", "--n-test", "8"]
    extract.main([NAME, "digits", "test", "embedding", "kl", *rows])
    assert capsys.readouterr().out == f"digits test {NAME}: 8 rows of embedding, kl in the store\n"
    assert {(tuple(e["meta"]["data"][:2]), e["meta"]["feature"], e["done"]) for e in store.entries()} == {
        (("digits", "test"), "embedding", 8), (("digits", "test"), "kl", 8)}  # fmt: skip
    before = contents(workplace)
    assert digits(["kl"])[1].store_keys  # the same rows as the call in Python
    assert before.items() <= contents(workplace).items()
    with pytest.raises(SystemExit, match="extract: unknown data set 'digitz'"):
        extract.main([NAME, "digitz", "test", "kl"])


# --- combinations


def test_the_embedding_alone(monkeypatch):
    train, test = digits(())
    assert list(train.blocks) == list(test.blocks) == ["embedding"]
    encoder = backbones.load(NAME)
    pixels = torch.from_numpy(
        np.stack([views.whole(train.data[i], 32, encoder.crop_ratio) for i in range(12)])
    )
    expected = encoder.embed(
        views.finish(pixels, None, encoder.mean, encoder.std, torch.float32)[:, 0]
    )
    np.testing.assert_allclose(train.blocks["embedding"], expected.numpy(), rtol=1e-4, atol=1e-5)
    assert {entry["meta"]["feature"] for entry in store.entries()} == {"embedding"}
    digits(KL)
    forbid(monkeypatch)
    assert digits(())[0].store_keys == train.store_keys


def test_letters():
    train, test = digits(n_train=40)
    assert fungi_features(train, test, "K")[0].shape == (40, 64)
    np.testing.assert_array_equal(
        fungi_features(train, test, "E")[1], evaluate.normalize(test.blocks["embedding"])
    )
    a, b = fungi_features(train, test, "E+K+D+S")
    assert (a.shape, b.shape) == ((40, 256), (8, 256))
    np.testing.assert_array_equal(
        b, evaluate.combine(test.blocks, ["embedding", "kl", "dino", "simclr"])
    )
    small = fungi_features(train, test, "E+K+D+S", size=10)
    fitted = pca.fit_pca(a, 10)
    np.testing.assert_array_equal(small[1], fitted.transform(b))
    assert (
        fungi_features(train, test, "E", size=10)[0].shape[1] == 10
    )  # the embedding alone too: Table 16
    assert (
        fungi_features(train, test, "E", size=64)[0].shape[1] == 64
    )  # not below its columns: skipped
    assert (
        fungi_features(train, test, "E+K", size=40)[0].shape[1] == 128
    )  # 40 rows: not below, skipped
    assert extract.LETTERS.keys() == {"embedding", *O.OBJECTIVES}


@pytest.mark.parametrize("letters", ["X", "E+X", "EK", "", "E+", "e"])
def test_unknown_letters_are_named(letters):
    rows = extract.Rows(
        None, {"embedding": np.ones((4, 2), np.float32), "kl": np.ones((4, 2), np.float32)}, ()
    )
    with pytest.raises(
        ValueError, match=r"unknown feature letters .* there are E, K, D, S, C, I, M joined by '\+'"
    ):
        fungi_features(rows, rows, letters)
    with pytest.raises(KeyError, match="simclr"):
        fungi_features(rows, rows, "E+S")


def test_subsets_are_balanced_and_zero_is_all(monkeypatch):
    asked = []
    monkeypatch.setattr(
        datasets,
        "load",
        lambda name, split, limit=None: (
            asked.append((split, limit)) or SimpleNamespace(split=split)
        ),
    )
    monkeypatch.setattr(extract, "_split", lambda encoder, data, *_: data.split)
    assert features("digits", NAME, n_train=0, n_test=None) == ("train", "test")
    assert asked == [("train", None), ("test", None)]


def test_projections_have_stores_of_their_own(workplace):
    blocks = [digits(["kl"], projection=kind)[0] for kind in ("rademacher", "khatri-rao", "sketch")]
    assert (
        len({rows.store_keys[1] for rows in blocks}) == 3
        and len({rows.store_keys[0] for rows in blocks}) == 1
    )
    assert not any(np.allclose(blocks[0].blocks["kl"], other.blocks["kl"]) for other in blocks[1:])


def test_exact_similarities_are_those_of_the_whole_gradients():
    train, test = digits(SMALL[:2], projection="exact")
    assert train.blocks["kl"].activations.shape == (12, 1, 64) and len(test.blocks["dino"]) == 8
    encoder = backbones.load(NAME)
    size = encoder.gradient_size()
    found = {}
    for objective in SMALL[:2]:
        parts = fungi.draw_parts(encoder, objective, 0)
        parts.projection = projection.Rademacher(size, size, matrix=torch.eye(size))
        found[objective.name] = [
            evaluate.normalize(
                np.concatenate(
                    [g for _, _, g in fungi.rows(encoder, objective, parts, rows.data, 0)]
                )
            )
            for rows in (test, train)
        ]
    own = [evaluate.normalize(rows.blocks["embedding"]) for rows in (test, train)]
    for letters, parts in (("K", ["kl"]), ("D", ["dino"]), ("E+K+D", ["kl", "dino", "embedding"])):
        expected = sum(a @ b.T for a, b in ((found | {"embedding": own})[name] for name in parts))
        np.testing.assert_allclose(
            extract.similarity(test, train, letters), expected, rtol=0, atol=2e-5
        )
    few = train.take(np.array([4, 0]))
    np.testing.assert_allclose(
        extract.similarity(test, few, "D"),
        extract.similarity(test, train, "D")[:, [4, 0]],
        atol=1e-6,
    )
    with pytest.raises(
        ValueError, match="E.K holds unprojected gradients, .*; use extract.similarity"
    ):
        fungi_features(train, test, "E+K")


def test_similarity_of_projected_rows_is_the_joined_features_inner_product():
    train, test = digits()
    a, b = fungi_features(train, test, "E+K+S")
    np.testing.assert_allclose(extract.similarity(test, train, "E+K+S"), b @ a.T, atol=1e-5)


def test_exact_needs_a_class_token_at_its_own_layer():
    with pytest.raises(
        ValueError, match="'exact' needs a class token at the last block, not .* blocks.0.attn.proj"
    ):
        digits(KL, projection="exact", layer="blocks.0.attn.proj")


@pytest.mark.parametrize("objective", SMALL, ids=lambda o: o.name)
def test_many_layers_in_one_pass_are_each_layer_alone(objective, monkeypatch, tmp_path):
    layers = ["blocks.0.attn.qkv", "blocks.2.mlp.fc1", "blocks.5.attn.proj", "blocks.5.mlp.fc2"]
    together = extract.layer_features(
        "digits", NAME, objective, layers, n_train=6, n_test=5, seed=2
    )
    monkeypatch.setenv("FUNGI_STORE", str(tmp_path / "alone"))
    for layer in layers:
        for rows, alone in zip(
            together[layer], digits([objective], 6, 5, seed=2, layer=layer), strict=True
        ):
            block, expected = rows.blocks[objective.name], alone.blocks[objective.name]
            assert np.linalg.norm(block - expected) < 1e-4 * np.linalg.norm(expected)
            assert rows.labels.tolist() == alone.labels.tolist() and list(rows.blocks) == [
                objective.name
            ]


def test_layers_are_stored_under_the_keys_of_single_ones(monkeypatch):
    layers = ["blocks.1.attn.proj", "blocks.5.attn.proj"]
    together = extract.layer_features("digits", NAME, KL[0], layers, n_train=6, n_test=5)
    digits((), 6, 5)  # the embedding
    forbid(monkeypatch)
    monkeypatch.setattr(fungi, "layer_rows", lambda *_: pytest.fail("something was extracted"))
    for layer in layers:
        alone = digits(KL, 6, 5, layer=layer)[0]
        np.testing.assert_array_equal(alone.blocks["kl"], together[layer][0].blocks["kl"])
    extract.layer_features("digits", NAME, KL[0], layers[::-1], n_train=6, n_test=5)
    with pytest.raises(ValueError, match="has no layer 'blocks.9.attn.proj'"):
        extract.layer_features("digits", NAME, KL[0], ["blocks.9.attn.proj"], n_train=6, n_test=5)

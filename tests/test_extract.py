"""From a data set's name to rows in the store: extracted once, resumed, keyed by what changes
them.
"""

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from helpers import entries
from torch.utils.data import Subset

from companion import features as named
from companion import paths
from companion.data import datasets
from companion.encoders.objectives import IBOT, PAPER, DeepCluster, FullAugmentation
from companion.features import features, layer_features
from companion.figures.style import LETTERS
from companion.protocol import fungi_features, similarity
from fungi_core import DINO, KL, Fungi, SimCLR, extract, load, projection, store
from fungi_core.features import apply_pca, fit_pca, join, normalize
from fungi_core.objectives import Objective
from fungi_core.rows import draw_parts, gradient_rows, view_batches
from fungi_core.views import Crops, ImageInputs, Patches

NAME = "random:test_vit"
SMALL = (
    KL(dim=32),
    DINO(Crops(local_count=2), dim=24),
    SimCLR(Patches(stride=2), dim=16, negatives=3),
)
ONE = SMALL[:1]


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """Return an empty store."""
    monkeypatch.setenv("FUNGI_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


def small(name=NAME, dtype="float32"):
    """Return the test network at 32 px."""
    return load(name, arguments={"img_size": 32}, device="cpu", dtype=dtype)


def digits(names=SMALL, n_train=12, n_test=8, backbone=None, **settings):
    return features(
        "digits", backbone or small(), names, n_train=n_train, n_test=n_test, **settings
    )


def contents(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.suffix in (".npy", ".json")
    }


def stored():
    return entries(paths.store_dir())


def stored_latents():
    """Return the entries of negatives."""
    return [entry for entry in stored() if entry["meta"].get("rows") == "latents of negatives"]


def forbid(monkeypatch):
    def stop(*_args, **_kwargs):
        pytest.fail("something was extracted")

    for rows in ("gradient_rows", "embedding_rows", "latents_of_views", "trunk_rows"):
        monkeypatch.setattr(extract, rows, stop)


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
    one = Fungi(small(), SMALL, pca=None, seed=3).fit(train.data)
    for rows in (train, test):
        for name, expected in one.extract(rows.data).items():
            limit = 1e-5 * np.abs(expected).max()
            np.testing.assert_allclose(rows.blocks[name], expected, rtol=0, atol=limit)
    some = train.take(np.array([3, 1]))
    assert some.labels.tolist() == train.labels[[3, 1]].tolist()
    np.testing.assert_array_equal(some.blocks["dino"], train.blocks["dino"][[3, 1]])


def test_a_second_call_extracts_nothing(monkeypatch, workplace):
    first, before = digits(), contents(workplace)
    forbid(monkeypatch)
    second = digits()
    for a, b in zip(first, second, strict=True):
        assert a.keys == b.keys
        for name in a.blocks:
            np.testing.assert_array_equal(a.blocks[name], b.blocks[name])
    digits(())  # parts of it neither
    digits(SMALL[1:])
    assert contents(workplace) == before


@pytest.mark.parametrize("passing", ["trunk_rows", "gradient_rows"])
@pytest.mark.parametrize("stop_at", range(3), ids=[o.name for o in SMALL])
def test_a_resumed_run_gives_identical_bytes(stop_at, passing, monkeypatch, tmp_path):
    """Stopped in the second shard of one objective: shards already there stay, the rest comes out
    to the bit.
    """
    monkeypatch.setenv("FUNGI_STORE", str(tmp_path / "whole"))
    digits(n_train=300)
    monkeypatch.setenv("FUNGI_STORE", str(tmp_path / "resumed"))
    intact = {name: getattr(extract, name) for name in ("trunk_rows", "gradient_rows")}

    def stopped(backbone, objective, *rest):
        for start, *blocks in intact[passing](backbone, objective, *rest):
            if objective.name == SMALL[stop_at].name and start >= store.SHARD:
                raise KeyboardInterrupt
            yield start, *blocks

    with monkeypatch.context() as patch:
        patch.setattr(extract, passing, stopped)
        with pytest.raises(KeyboardInterrupt):
            digits(n_train=300)
    partial, extracted = contents(tmp_path / "resumed"), {name: [] for name in intact}

    def counting(name):
        def counted(backbone, objective, *rest):
            images = next(one for one in rest if isinstance(one, Subset))
            extracted[name].append((images.dataset.split, objective.name, len(images)))
            return intact[name](backbone, objective, *rest)

        return counted

    for name in intact:
        monkeypatch.setattr(extract, name, counting(name))
    digits(n_train=300)
    # Not one row of the first shard again.
    assert extracted[passing][0] == ("train", SMALL[stop_at].name, 300 - store.SHARD)
    for name, found in extracted.items():
        # Where gradients are torn, the trunk of their objective is there.
        first = stop_at + (name != passing and passing == "gradient_rows")
        wanted = [one.name for one in SMALL[first:]]
        assert [objective for split, objective, _ in found if split == "train"] == wanted
    whole = contents(tmp_path / "whole")
    assert contents(tmp_path / "resumed") == whole
    assert partial and all(whole[name] == data for name, data in partial.items())


@pytest.mark.parametrize("size", [32, 64, 96, 224])
@pytest.mark.parametrize("objective", [KL(), DINO(), SimCLR()], ids=lambda o: o.name)
def test_batches_end_where_shards_end(size, objective, monkeypatch):
    """Else a run resumed at a shard would see other batches, and other last bits."""
    kind = type(objective.views)
    monkeypatch.setattr(kind, "draw", lambda *_: np.zeros((1, 1, 1, 3), np.uint8))
    monkeypatch.setattr(kind, "finish", lambda self, batch, *_: batch)
    monkeypatch.setattr(ImageInputs, "decode", lambda self, item, name: item)
    monkeypatch.setattr(ImageInputs, "content", lambda self, item: b"")
    inputs = ImageInputs(size, (0, 0, 0), (1, 1, 1))
    stub = SimpleNamespace(name="stub", inputs=inputs, device="cpu", view_dtype=None)
    batches = list(view_batches(stub, objective.views, objective.name, range(600), 0))
    assert [start for start, _ in batches] == list(
        np.cumsum([0, *(len(batch) for _, batch in batches)])[:-1]
    )
    assert sum(len(batch) for _, batch in batches) == 600
    assert {0, 256, 512} <= {start for start, _ in batches}


def test_two_targets_with_different_gaps_are_extracted_once(monkeypatch, workplace):
    train, _ = digits(ONE, n_train=600)
    embedding, kl = (workplace / key for key in train.keys)
    before = contents(workplace)
    for folder, shards in ((embedding, (0,)), (kl, (0, 256))):
        for start in shards:
            next(folder.glob(f"{start:09d}-*.npy")).unlink()
    seen, intact = [], extract.gradient_rows

    def counted(backbone, objective, parts, images, *rest):
        seen.append(len(images))
        return intact(backbone, objective, parts, images, *rest)

    monkeypatch.setattr(extract, "gradient_rows", counted)
    digits(ONE, n_train=600)
    assert seen == [512] and contents(workplace) == before


def test_a_complete_embedding_is_not_locked_by_the_gradients_of_another_seed(monkeypatch):
    """Else all seeds of a split would wait for each other on a cluster."""
    embedding_key, kl_key = digits(ONE)[0].keys
    locked, intact = [], store.Entry.lock
    monkeypatch.setattr(
        store.Entry,
        "lock",
        lambda entry, *part: (locked.append(entry.key), intact(entry, *part))[1],
    )
    train, test = digits(ONE, seed=1)
    assert locked == [train.keys[1], test.keys[1]] and embedding_key == train.keys[0]


@pytest.mark.parametrize(
    ("lacking", "joined"),
    [
        ([[], []], []),
        ([[256], [0, 256]], [(0, 512)]),
        ([[0, 256], [512]], [(0, 768)]),
        ([[0], [512, 768]], [(0, 256), (512, 900)]),
    ],
)
def test_gaps_are_the_union_of_what_entries_lack_in_whole_files(lacking, joined, tmp_path):
    entries = [store.open_entry({"i": i}, 900, 1, tmp_path) for i in range(len(lacking))]
    for entry, absent in zip(entries, lacking, strict=True):
        with entry.lock():
            for first in {0, 256, 512, 768} - {*absent}:
                entry.write(first, np.ones((min(256, 900 - first), 1)))
    assert store.gaps(entries) == joined
    part = [(256, 512)] if 256 in {*lacking[0], *lacking[1]} else []
    assert store.gaps(entries, 256, 512) == part


# --- keys


def keys(*args, **settings):
    """{(split, feature): key} of a call."""
    found = digits(*args, **settings)
    feature = {entry["key"]: entry["meta"]["feature"] for entry in stored()}
    return {(rows.data.split, feature[key]): key for rows in found for key in rows.keys}


def changed(a, b):
    return {place for place in a if a[place] != b.get(place)}


def of(*names):
    return {(split, name) for split in ("train", "test") for name in names}


GRADIENTS = of("kl", "dino", "simclr")
EVERY = of("embedding") | GRADIENTS


def test_keys_hold_all_that_changes_a_feature():
    base = keys()
    assert len(set(base.values())) == 8
    assert changed(base, keys(seed=1)) == GRADIENTS
    assert changed(base, keys(layer="blocks.4.attn.proj")) == GRADIENTS
    assert changed(base, keys(backbone=small(dtype="bfloat16"))) == EVERY
    others = (
        (replace(SMALL[0], temperature=1), of("kl")),
        (replace(SMALL[1], student_temperature=0.2), of("dino")),
        (replace(SMALL[1], views=Crops(local_scale=(0.1, 0.2))), of("dino")),
        (replace(SMALL[2], denominator="published"), of("simclr")),
        (replace(SMALL[2], views=Patches(stride=2, native=True)), of("simclr")),
    )
    for other, expected in others:
        objectives = [other if one.name == other.name else one for one in SMALL]
        assert changed(base, keys(objectives)) == expected
    other_weights = small()
    other_weights.model.norm.bias.data[0] += 1e-3
    assert changed(base, keys(backbone=other_weights)) == EVERY
    squeezed = small()
    squeezed = replace(squeezed, inputs=replace(squeezed.inputs, crop=0.5))
    assert changed(base, keys(backbone=squeezed)) == EVERY


@dataclass(frozen=True)
class Entropy(Objective):
    """The README's objective, which names no views."""

    dim: int = 16
    name: ClassVar[str] = "entropy"

    def loss(self, embeddings, heads, negatives=None):
        log_q = self.latents(embeddings, heads).log_softmax(-1)
        return -(log_q.exp() * log_q).sum(-1).mean(-1)


class Edited(Entropy):
    def loss(self, embeddings, heads, negatives=None):
        return 2 - super().loss(embeddings, heads, negatives)


class Wider(Entropy):
    normalize = False  # a setting without an annotation


def test_an_objective_of_ones_own_has_a_key_of_its_fields_and_its_code():
    same = {"__module__": __name__, "__qualname__": "Entropy"}
    kinds = [Entropy, *(type("Entropy", (one,), same) for one in (Edited, Wider))]
    found = [digits([kind()]) for kind in kinds]
    made = [rows[1].keys[-1] for rows in found]
    assert len(set(made)) == 3 and digits([Entropy()])[1].keys[-1] == made[0]
    a, b = (rows[1].blocks["entropy"] for rows in found[:2])
    np.testing.assert_allclose(a, -b, rtol=1e-4, atol=1e-8)  # and the rows of its own loss


def test_seeds_and_settings_may_be_numpy_numbers():
    one = [KL(dim=16)]
    assert digits(one, seed=np.int64(1))[0].keys == digits(one, seed=1)[0].keys
    with pytest.raises(ValueError, match="meta field 'settings': .*; accepted: text, finite"):
        digits([KL(dim=np.int64(16))])


def test_objectives_without_a_head_and_full_augmentation_have_stores_of_their_own():
    base = keys()
    bare = keys([replace(o, head=False) for o in SMALL])
    assert changed(base, bare) == GRADIENTS
    # 9 views each; without a head they are embeddings
    assert sorted(entry["width"] for entry in stored_latents()) == [9 * 16, 9 * 64]
    coloured = keys([SMALL[0], replace(SMALL[1], views=FullAugmentation(local_count=2)), SMALL[2]])
    assert changed(base, coloured) == of("dino")


def test_a_smaller_training_set_touches_the_test_rows_through_the_negatives_alone():
    base = keys(n_train=12)
    assert changed(base, keys(n_train=10)) == {place for place in EVERY if place[0] == "train"} | {
        ("test", "simclr")
    }


def test_keys_hold_nothing_that_does_not_change_a_feature(monkeypatch):
    base = digits()
    again = keys(tuple(reversed(SMALL)))  # the order of objectives
    assert {again[place] for place in EVERY} == {key for rows in base for key in rows.keys}
    assert set(keys(["kl"])) == of("embedding", "kl")
    key_of_kl = digits(ONE)[0].keys
    monkeypatch.setenv("FUNGI_STORE", str(paths.store_dir()) + "-small-batches")
    monkeypatch.setattr(ImageInputs, "at_once", lambda *_: 4)
    small_batches = digits(ONE)[0]
    assert small_batches.keys == key_of_kl
    np.testing.assert_allclose(
        small_batches.blocks["kl"], base[0].blocks["kl"], rtol=1e-4, atol=1e-9
    )


def test_negatives_are_drawn_once_for_both_splits_and_every_layer(monkeypatch):
    calls, intact = [], extract.latents_of_views

    def counted(*args):
        calls.append(len(args[3]))
        return intact(*args)

    monkeypatch.setattr(extract, "latents_of_views", counted)
    digits(SMALL[2:])
    digits(SMALL[2:], layer="blocks.4.attn.proj")
    assert calls == [3]
    (negatives,) = stored_latents()
    assert (negatives["n"], negatives["width"]) == (3, 9 * 16)
    assert negatives["meta"]["data"][:2] == ["digits", "train"]
    digits(SMALL[2:], seed=1)
    assert calls == [3, 3]


def test_deepcluster_and_ibot_through_the_store(monkeypatch):
    crops = replace(DeepCluster().views, local_count=1)
    names = [
        DeepCluster(crops, dim=8, images_per_cluster=4),
        IBOT(Crops(local_count=1), dim=12),
    ]
    train, test = digits(names)
    assert list(test.blocks) == ["embedding", "deepcluster", "ibot"]
    assert all(np.isfinite(block).all() and block.any() for block in test.blocks.values())
    (latents,) = stored_latents()  # once, of the two global crops of all training rows
    assert (latents["n"], latents["width"]) == (12, 2 * 8)
    one = Fungi(small(), names, pca=None).fit(train.data)
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
    complete = [entry for entry in stored() if entry["done"]]
    assert all(entry["done"] == entry["n"] for entry in complete)
    gradients = [entry["meta"]["feature"] for entry in complete if "rows" not in entry["meta"]]
    assert name not in gradients
    assert not list(workplace.rglob("*.tmp"))
    train, _ = digits(wanted)  # and the same call works once the loss does
    assert np.isfinite(train.blocks[name]).all()


def test_an_item_that_is_no_image_has_the_name_that_its_data_set_gives_it():
    class Drawer(list):
        def where(self, i):
            return f"drawer {i}"

    items = Drawer([np.zeros((32, 32), np.uint8), {}])
    with pytest.raises(ValueError, match="^drawer 1 is a dict"):
        next(view_batches(small(), KL().views, "kl", items, 0))


def test_one_name_twice_is_refused_before_it_can_mix_two_settings(workplace):
    for names in (
        ["kl", "kl"],
        ["kl", KL(temperature=1)],
        [SimCLR(Patches(stride=2)), SimCLR()],
    ):
        with pytest.raises(ValueError, match="each objective can be used once"):
            digits(names)
    assert contents(workplace) == {}


def test_unknown_names_are_one_line(workplace):
    for call in (
        lambda: digits(["byol"]),
        lambda: features("digitz", small()),
        lambda: digits(layer="blocks.9.mlp"),
        lambda: digits(projection="dense"),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert "\n" not in str(error.value)
    assert contents(workplace) == {}


def test_the_command_writes_both_splits_and_says_so(capsys, monkeypatch, workplace):
    monkeypatch.setattr(named, "load", small)
    rows = ["--n-train", "12", "--n-test", "8"]
    named.main([NAME, "digits", "embedding", "kl", *rows])
    said = f"digits {NAME}: 12 train rows and 8 test rows of embedding, kl in the store\n"
    assert capsys.readouterr().out == said
    found = {(*e["meta"]["data"][:2], e["meta"]["feature"], e["done"]) for e in stored()}
    kinds = ("embedding", "kl", "trunk")
    sizes = {"train": 12, "test": 8}
    assert found == {("digits", x, kind, n) for x, n in sizes.items() for kind in kinds}
    before = contents(workplace)
    # The same rows as the call in Python.
    for split in digits(["kl"]):
        assert set(split.keys) <= {name.split("/")[0] for name in before}
    assert before == contents(workplace)
    with pytest.raises(SystemExit, match="features: unknown data set 'digitz'"):
        named.main([NAME, "digitz", "kl"])
    with pytest.raises(SystemExit, match="features: unknown image objective 'byol'"):
        named.main([NAME, "digits", "byol"])


# --- combinations


def test_the_embedding_alone(monkeypatch):
    train, test = digits(())
    assert list(train.blocks) == list(test.blocks) == ["embedding"]
    encoder = small()
    inputs = encoder.inputs
    images = [inputs.whole(inputs.decode(train.data[i], "")) for i in range(12)]
    expected = encoder.embed(inputs.finish(inputs.stack(images), torch.float32)[:, 0])
    np.testing.assert_allclose(train.blocks["embedding"], expected.numpy(), rtol=1e-4, atol=1e-5)
    assert {entry["meta"]["feature"] for entry in stored()} == {"embedding"}
    digits(ONE)
    forbid(monkeypatch)
    assert digits(())[0].keys == train.keys


def test_letters():
    train, test = digits(n_train=40)
    assert fungi_features(train, test, "K")[0].shape == (40, 64)
    np.testing.assert_array_equal(
        fungi_features(train, test, "E")[1], normalize(test.blocks["embedding"])
    )
    a, b = fungi_features(train, test, "E+K+D+S")
    assert (a.shape, b.shape) == ((40, 256), (8, 256))
    np.testing.assert_array_equal(b, join(test.blocks, ["embedding", "kl", "dino", "simclr"]))
    small = fungi_features(train, test, "E+K+D+S", size=10)
    fitted = fit_pca(a, 10)
    np.testing.assert_array_equal(small[1], apply_pca(fitted, b))
    assert (
        fungi_features(train, test, "E", size=10)[0].shape[1] == 10
    )  # the embedding alone too: Table 16
    assert (
        fungi_features(train, test, "E", size=64)[0].shape[1] == 64
    )  # not below its columns: skipped
    assert (
        fungi_features(train, test, "E+K", size=40)[0].shape[1] == 128
    )  # 40 rows: not below, skipped
    known = {one.name for paper in PAPER.values() for one in paper}
    assert LETTERS.keys() == {"embedding", *known}


@pytest.mark.parametrize("letters", ["X", "E+X", "EK", "", "E+", "e"])
def test_unknown_letters_are_named(letters):
    rows = extract.Features(
        None, {"embedding": np.ones((4, 2), np.float32), "kl": np.ones((4, 2), np.float32)}, ()
    )
    with pytest.raises(
        ValueError, match="unknown feature letter .*; there are E, K, D, S, C, I, M"
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
            asked.append((split, limit)) or SimpleNamespace(split=split, modality="image")
        ),
    )
    monkeypatch.setattr(named, "extract", lambda data, *_, **settings: data.split)
    assert features("digits", small(), n_train=0, n_test=None) == ("train", "test")
    assert asked == [("train", None), ("test", None)]


def test_projections_have_stores_of_their_own(workplace):
    blocks = [digits(["kl"], projection=kind)[0] for kind in ("rademacher", "khatri-rao", "sketch")]
    assert (
        len({rows.keys[1] for rows in blocks}) == 3 and len({rows.keys[0] for rows in blocks}) == 1
    )
    assert not any(np.allclose(blocks[0].blocks["kl"], other.blocks["kl"]) for other in blocks[1:])


def test_exact_similarities_are_those_of_the_whole_gradients():
    train, test = digits(SMALL[:2], projection="exact")
    assert train.blocks["kl"].activations.shape == (12, 1, 64) and len(test.blocks["dino"]) == 8
    encoder = small()
    rows, columns = encoder.gradient_shape()
    size = rows * columns
    found = {}
    for objective in SMALL[:2]:
        parts = draw_parts(encoder, objective, 0)
        parts.projection = projection.Rademacher(size, size, matrix=torch.eye(size))
        made = lambda data, o=objective, p=parts: gradient_rows(encoder, o, [p], data, 0)
        found[objective.name] = [
            normalize(np.concatenate([g for _, _, (g,) in made(split.data)]))
            for split in (test, train)
        ]
    own = [normalize(rows.blocks["embedding"]) for rows in (test, train)]
    for letters, parts in (("K", ["kl"]), ("D", ["dino"]), ("E+K+D", ["kl", "dino", "embedding"])):
        expected = sum(a @ b.T for a, b in ((found | {"embedding": own})[name] for name in parts))
        np.testing.assert_allclose(similarity(test, train, letters), expected, rtol=0, atol=2e-5)
    few = train.take(np.array([4, 0]))
    np.testing.assert_allclose(
        similarity(test, few, "D"),
        similarity(test, train, "D")[:, [4, 0]],
        atol=1e-6,
    )
    with pytest.raises(ValueError, match="E.K holds unprojected gradients, .*; use similarity"):
        fungi_features(train, test, "E+K")


def test_similarity_of_projected_rows_is_the_joined_features_inner_product():
    train, test = digits()
    a, b = fungi_features(train, test, "E+K+S")
    np.testing.assert_allclose(similarity(test, train, "E+K+S"), b @ a.T, atol=1e-5)


def test_exact_needs_a_class_token_at_its_own_layer():
    with pytest.raises(
        ValueError, match="'exact' needs a class token at the last block, not .* blocks.0.attn.proj"
    ):
        digits(ONE, projection="exact", layer="blocks.0.attn.proj")


@pytest.mark.parametrize("objective", SMALL, ids=lambda o: o.name)
def test_many_layers_in_one_pass_are_each_layer_alone(objective, monkeypatch, tmp_path):
    layers = ["blocks.0.attn.qkv", "blocks.2.mlp.fc1", "blocks.5.attn.proj", "blocks.5.mlp.fc2"]
    together = layer_features("digits", small(), objective, layers, n_train=6, n_test=5, seed=2)
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
    together = layer_features("digits", small(), ONE[0], layers, n_train=6, n_test=5)
    digits((), 6, 5)  # the embedding
    forbid(monkeypatch)
    for layer in layers:
        alone = digits(ONE, 6, 5, layer=layer)[0]
        np.testing.assert_array_equal(alone.blocks["kl"], together[layer][0].blocks["kl"])
    layer_features("digits", small(), ONE[0], layers[::-1], n_train=6, n_test=5)
    with pytest.raises(ValueError, match="has no layer 'blocks.9.attn.proj'"):
        layer_features("digits", small(), ONE[0], ["blocks.9.attn.proj"], n_train=6, n_test=5)

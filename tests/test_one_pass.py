"""Several gradients from one pass, and rows that go to several entries of the store: as one at a
time.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small import LAYERS, SMALL, Pictures, pictures, small

from fungi_core import rows, store
from fungi_core.extract import describe, extract, fill_gradients
from fungi_core.filling import Target, write
from fungi_core.rows import draw_negatives, draw_parts, gradient_rows, view_batches
from fungi_core.store import SHARD


def blocks(backbone, objective, parts, images) -> list[np.ndarray]:
    """Return the gradients (N, d) of each of ``parts``."""
    done = [gradients for *_, gradients in gradient_rows(backbone, objective, parts, images, 0)]
    return [np.concatenate(one) for one in zip(*done, strict=True)]


def close(found, expected, tolerance=1e-4):
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


# --- parts of one pass


@pytest.mark.parametrize("objective", SMALL, ids=lambda o: o.name)
def test_parts_that_differ_in_layer_or_negatives_are_each_part_alone(objective):
    """Every layer with every batch of negatives, in an order that mixes them."""
    backbone, images = small(), pictures(5)
    layers = (LAYERS[5], "blocks.1.mlp.fc1", "blocks.4.attn.qkv")
    parts = []
    for seen in (images[:4], images[1:]):
        drawn = [draw_parts(backbone, objective, 0, layer) for layer in layers]
        negatives = draw_negatives(backbone, objective, drawn[0].heads, seen, 0)
        parts += [replace(part, negatives=negatives) for part in drawn]
    parts = [parts[i] for i in (3, 0, 5, 1, 4, 2)]
    together = blocks(backbone, objective, parts, images)
    for part, found in zip(parts, together, strict=True):
        (alone,) = blocks(backbone, objective, [part], images)
        close(found, alone)
    distinct = len({block.tobytes() for block in together})
    assert distinct == (6 if objective.negatives else 3)


def test_parts_share_the_views_and_the_forward_pass(monkeypatch):
    backbone, images, calls = small(), pictures(4), []
    objective = SMALL[2]
    drawn = draw_parts(backbone, objective, 0)
    draw = lambda i: torch.randn(9, 16, generator=torch.Generator().manual_seed(i))
    parts = [replace(drawn, negatives=draw(i)) for i in range(3)]
    intact = rows.view_batches
    monkeypatch.setattr(
        rows, "view_batches", lambda *args: (calls.append("views"), intact(*args))[1]
    )
    backbone.model.patch_embed.register_forward_hook(lambda *_: calls.append("forward"))
    together = blocks(backbone, objective, parts, images)
    assert calls == ["views", "forward"]
    for part, found in zip(parts, together, strict=True):
        np.testing.assert_array_equal(found, blocks(backbone, objective, [part], images)[0])


def test_embeddings_come_along_whatever_the_parts():
    backbone, images = small(), pictures(5)
    parts = [draw_parts(backbone, SMALL[0], 0, layer) for layer in LAYERS[2:4]]
    done = list(gradient_rows(backbone, SMALL[0], parts, images, 0))
    alone = [e for _, e, _ in rows.embedding_rows(backbone, images)]
    close(np.concatenate([e for _, e, _ in done]), np.concatenate(alone), 1e-5)


def test_the_mean_view_is_that_of_the_embeddings_of_all_views():
    backbone, images, objective = small(), pictures(5), SMALL[1]
    done = gradient_rows(backbone, objective, [draw_parts(backbone, objective, 0)], images, 0)
    (batch,) = (batch for _, batch in view_batches(backbone, objective.views, "dino", images, 0))
    with torch.inference_mode():
        each = [[backbone.embed(view[None])[0].numpy() for view in views] for views in batch]
    unit = np.stack(each) / np.linalg.norm(each, axis=-1, keepdims=True)  # (B, V, D)
    close(np.concatenate([seen for _, seen, _ in done]), unit.mean(1), 1e-5)


# --- where rows go


def values(n: int, source: int) -> np.ndarray:
    return np.sin(np.arange(n * 4) + 1000 * source).reshape(n, 4).astype(np.float32)


def passing(n: int, asked: list):
    """Return a pass over items that gives what `values` says, in batches of 64."""

    def made(some):
        first = some.indices.start
        asked.append((first, some.indices.stop))
        for start in range(0, len(some), 64):
            stop = min(start + 64, len(some))
            batch = slice(first + start, first + stop)
            gradients = [values(n, source)[batch] for source in (0, 1)]
            yield start, values(n, 2)[batch], gradients

    return made


def scattered(n: int, count: int, seed: int) -> np.ndarray:
    """Return the rows of n items: ``count`` of them in a random order, -1 for the others."""
    out = np.full(n, -1)
    out[np.random.default_rng(seed).permutation(n)[:count]] = np.arange(count)
    return out


def test_scattered_rows_go_where_their_targets_say_and_others_nowhere(tmp_path):
    n, asked = 700, []
    places = [scattered(n, 300, 0), scattered(n, 301, 1), np.arange(n)]
    targets = [
        Target(store.open_entry({"i": i}, place.max() + 1, 4, tmp_path), place, source)
        for i, (place, source) in enumerate(zip(places, (0, 1, None), strict=True))
    ]
    write(targets, range(n), "scattered", passing(n, asked))
    assert asked == [(0, n)]
    for target, source in zip(targets, (0, 1, 2), strict=True):
        items = np.argsort(target.rows)[np.sum(target.rows < 0) :]  # item of row 0, of row 1, ...
        np.testing.assert_array_equal(target.entry.read(), values(n, source)[items])


def test_only_what_a_target_lacks_is_passed_over_again_in_whole_batches(tmp_path):
    n, asked = 1000, []
    place = np.full(n, -1)
    place[100:700] = np.arange(600)  # its second file: items 356 to 612
    entry = store.open_entry({}, 600, 4, tmp_path)
    write([Target(entry, place)], range(n), "first", passing(n, asked))
    before = {file.name: file.read_bytes() for file in entry.path.iterdir()}
    next(entry.path.glob(f"{SHARD:09d}-*")).unlink()
    write([Target(entry, place)], range(n), "again", passing(n, asked))
    assert asked == [(0, 768), (SHARD, 768)]
    assert {file.name: file.read_bytes() for file in entry.path.iterdir()} == before
    write([Target(entry, place)], range(n), "nothing", passing(n, asked))
    assert len(asked) == 2


@pytest.fixture(scope="module")
def folds():
    """Return two folds of 600 pictures: halves in the pictures' order, each trained on once."""
    order = np.random.default_rng(0).permutation(600)
    halves = [tuple(sorted(order[part].tolist())) for part in (slice(300), slice(300, None))]
    return [
        (Pictures("train", halves[i], f"fold {i}"), Pictures("test", halves[1 - i], f"fold {i}"))
        for i in range(2)
    ]


def fill_folds(folds, backbone, objective, root) -> list[store.Entry]:
    everything, targets = Pictures("all", tuple(range(600))), []
    for source, (train, test) in enumerate(folds):
        for data in (train, test):
            place = np.full(600, -1)
            place[list(data.numbers)] = np.arange(len(data))
            meta = describe(data, backbone, objective, train, 0, backbone.layer, "rademacher")
            entry = store.open_entry(meta, len(data), backbone.width, root)
            targets.append(Target(entry, place, source))
    sources = [(backbone.layer, train) for train, _ in folds]
    fill_gradients(targets, everything, backbone, objective, sources, 0, root=root)
    return [target.entry for target in targets]


@pytest.mark.parametrize("objective", [SMALL[0], SMALL[2]], ids=lambda o: o.name)
def test_folds_from_one_pass_are_each_fold_alone(objective, folds, tmp_path):
    backbone = small()
    entries = fill_folds(folds, backbone, objective, tmp_path / "together")
    splits = [(train, data) for train, test in folds for data in (train, test)]
    for entry, (train, data) in zip(entries, splits, strict=True):
        alone = extract(data, backbone, [objective], train=train, root=tmp_path / "alone")
        assert alone.keys[1] == entry.key
        close(entry.read(), alone.blocks[objective.name])
    of_one_image = {float(e.read()[0, 0]) for e in (entries[0], entries[3])}  # same items
    assert len(of_one_image) == (2 if objective.negatives else 1)


@pytest.mark.parametrize("objective", [SMALL[0], SMALL[2]], ids=lambda o: o.name)
def test_a_fold_that_lost_a_file_gets_the_same_bytes_back(objective, folds, tmp_path):
    """Its rows are scattered over the pass: the batches must be those of the first time."""
    entries = fill_folds(folds, small(), objective, tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.npy")}
    for entry in (entries[0], entries[3]):
        next(entry.path.glob("*.npy")).unlink()
    fill_folds(folds, small(), objective, tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.npy")} == before

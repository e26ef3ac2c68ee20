"""Several gradients from one pass, and rows that go to several entries of the store: as one at a
time.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small import LAYERS, SMALL, Pictures, pictures, small

from companion import controls
from fungi_core import rows, store
from fungi_core.extract import extract
from fungi_core.filling import Pass, write
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
def test_parts_that_differ_in_layer_are_each_part_alone(objective):
    backbone, images = small(), pictures(5)
    layers = (LAYERS[5], "blocks.1.mlp.fc1", "blocks.4.attn.qkv")
    parts = [draw_parts(backbone, objective, 0, layer) for layer in layers]
    negatives = draw_negatives(backbone, objective, parts[0].heads, images, 0)
    parts = [replace(part, negatives=negatives) for part in parts]
    together = blocks(backbone, objective, parts, images)
    for part, found in zip(parts, together, strict=True):
        (alone,) = blocks(backbone, objective, [part], images)
        close(found, alone)
    assert len({block.tobytes() for block in together}) == 3


@pytest.mark.cuda
@pytest.mark.parametrize("objective", SMALL, ids=lambda o: o.name)
@pytest.mark.parametrize("layer", [LAYERS[5], LAYERS[3]])  # the class-token path, and the taps
def test_a_cards_gradients_are_the_cpus(objective, layer):
    """DINO's crops are made on the card: PIL's rounding is a few thousandths of its gradient."""
    found = []
    for device in ("cpu", "cuda"):
        backbone, images = small(device), pictures(5)
        part = draw_parts(backbone, objective, 0, layer)
        part.negatives = draw_negatives(backbone, objective, part.heads, images, 0)
        found.append(blocks(backbone, objective, [part], images)[0])
    close(found[1], found[0], 2e-2 if objective.name == "dino" else 1e-3)


def test_parts_share_the_views_and_the_forward_pass(monkeypatch):
    backbone, images, calls = small(), pictures(2), []
    objective = SMALL[0]
    parts = [draw_parts(backbone, objective, 0, layer) for layer in LAYERS[2:4]]
    intact = rows.view_batches
    monkeypatch.setattr(
        rows, "view_batches", lambda *args: (calls.append("views"), intact(*args))[1]
    )
    backbone.model.patch_embed.register_forward_hook(lambda *_: calls.append("forward"))
    blocks(backbone, objective, parts, images)
    assert calls == ["views", "forward"]


def test_embeddings_come_along_whatever_the_parts():
    backbone, images = small(), pictures(5)
    parts = [draw_parts(backbone, SMALL[0], 0, layer) for layer in LAYERS[2:4]]
    done = list(gradient_rows(backbone, SMALL[0], parts, images, 0))
    alone = [e for _, (e,) in rows.embedding_rows(backbone, images)]
    close(np.concatenate([e for _, e, _ in done]), np.concatenate(alone), 1e-5)


@pytest.mark.parametrize("kept", [True, False], ids=["from the kept trunk", "from the images"])
def test_the_mean_view_is_that_of_the_embeddings_of_all_views(kept, tmp_path, monkeypatch):
    backbone, objective = small(), SMALL[1]
    data = Pictures("train", tuple(range(5)))
    monkeypatch.setenv("FUNGI_STORE", str(tmp_path))
    if kept:
        extract(data, backbone, [objective], root=tmp_path)
    batches = view_batches(backbone, objective.views, "dino", data, 0)
    ((_, batch),) = batches
    with torch.inference_mode():
        each = [[backbone.embed(view[None])[0].numpy() for view in views] for views in batch]
    unit = np.stack(each) / np.linalg.norm(each, axis=-1, keepdims=True)  # (B, V, D)
    if kept:
        monkeypatch.setattr(rows, "view_batches", lambda *_: pytest.fail("views were made"))
    close(controls.mean_view(data, backbone, objective, 0), unit.mean(1), 1e-5)


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
            yield start, [values(n, source)[batch] for source in (0, 1, 2)]

    return made


def test_each_entry_gets_its_block(tmp_path):
    n, asked = 700, []
    entries = [store.open_entry({"i": i}, n, 4, tmp_path) for i in range(3)]
    write(Pass(entries, range(n), "three", passing(n, asked)))
    assert asked == [(0, n)]
    for i, entry in enumerate(entries):
        np.testing.assert_array_equal(entry.read(), values(n, i))


def test_only_what_an_entry_lacks_is_passed_over_again_in_whole_files(tmp_path):
    n, asked = 1000, []
    entry = store.open_entry({}, n, 4, tmp_path)
    write(Pass([entry], range(n), "first", passing(n, asked)))
    before = {file.name: file.read_bytes() for file in entry.path.iterdir()}
    next(entry.path.glob(f"{SHARD:09d}-*")).unlink()
    write(Pass([entry], range(n), "again", passing(n, asked)))
    assert asked == [(0, n), (SHARD, 2 * SHARD)]
    assert {file.name: file.read_bytes() for file in entry.path.iterdir()} == before
    write(Pass([entry], range(n), "nothing", passing(n, asked)))
    assert len(asked) == 2

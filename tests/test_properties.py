"""Property-based tests: whatever the sizes, seeds and orders, what the other tests show on examples
holds.

Examples are drawn by a fixed seed (`conftest`), so that a run of the tests does not depend on luck.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from companion.evaluate import knn as evaluate
from companion.evaluate.cka import LinearCKA
from fungi_core import DINO, KL, SimCLR, projection, search, store, views
from fungi_core.gradients import Factors
from fungi_core.seeds import content_id, generator

seeds = st.integers(0, 2**32 - 1)


# --- views


def drawn(image, objective, size, crop, seed):
    """What one image contributes to a batch, as `rows.view_batches` draws it."""
    inputs = views.ImageInputs(size, (0.0,) * 3, (1.0,) * 3, crop)
    rng = generator(seed, objective.name, content_id(inputs.content(image)))
    return objective.views.draw(image, inputs, rng, "cpu")


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 20), seeds)
def test_crop_boxes_lie_in_the_image_and_are_those_of_their_seed(width, height, count, seed):
    scales = np.tile([[0.05, 1.0]], (count, 1))
    boxes = views.crop_boxes(width, height, scales, generator(seed))
    left, top, right, bottom = boxes.T
    assert (
        boxes.shape == (count, 4)
        and (0 <= left).all()
        and (left < right).all()
        and (right <= width).all()
    )
    assert (0 <= top).all() and (top < bottom).all() and (bottom <= height).all()
    np.testing.assert_array_equal(boxes, views.crop_boxes(width, height, scales, generator(seed)))


@given(
    st.integers(1, 60),
    st.integers(1, 60),
    st.sampled_from([KL(), DINO(), SimCLR()]),
    seeds,
    st.sampled_from([8, 24, 32]),
    st.sampled_from([1.0, 0.875, 0.9]),
)
def test_views_of_any_image_have_their_shape_and_depend_on_content_and_seed_alone(
    width, height, objective, seed, size, ratio
):
    pixels = generator("picture", seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    found = drawn(Image.fromarray(pixels), objective, size, ratio, seed)
    count = 12 if objective.name == "dino" else 1
    assert found.dtype == np.uint8 and found.shape == (count, size, size, 3)
    again = drawn(views.to_image(pixels.copy()), objective, size, ratio, seed)
    np.testing.assert_array_equal(found, again)


@given(
    hnp.arrays(
        np.uint8, hnp.array_shapes(min_dims=3, max_dims=3, max_side=12).map(lambda s: (*s[:2], 3))
    )
)
def test_one_colour_stays_one_colour(pixels):
    """No resize, crop or patch brings in a pixel from outside the image (black padding)."""
    pixels[:] = pixels[0, 0]
    for objective in (KL(), DINO(), SimCLR()):
        found = drawn(Image.fromarray(pixels), objective, 16, 0.9, 0)
        assert (found == pixels[0, 0]).all()


# --- projection


@st.composite
def factors(draw, most: int = 4) -> Factors:
    batch, n, d_out, d_in = (draw(st.integers(1, k)) for k in (most, 3, 5, 7))
    rng = np.random.default_rng(draw(seeds))
    a, d = (torch.from_numpy(rng.standard_normal((batch, n, k), np.float32)) for k in (d_in, d_out))
    return Factors(a, d, draw(st.booleans()))


def sizes(x: Factors) -> tuple[int, int]:
    return x.output_gradients.shape[2], x.activations.shape[2] + x.bias


@given(
    factors(),
    st.sampled_from(["rademacher", "khatri-rao", "sketch"]),
    st.integers(1, 20),
    seeds,
    st.floats(-100, 100),
)
def test_projections_are_linear_and_each_sample_is_alone(x, kind, rows, seed, scale):
    drawn = projection.draw(kind, rows, *sizes(x), seed)
    whole = drawn.apply(x)
    assert whole.shape == (len(x), rows) and whole.dtype == torch.float32
    near = 1e-4 * (1 + abs(scale)) * (1 + whole.abs().max())
    scaled = drawn.apply(Factors(x.activations, x.output_gradients * scale, x.bias))
    assert (scaled - scale * whole).abs().max() <= near
    for i in range(len(x)):
        assert (drawn.apply(x[i : i + 1]) - whole[i]).abs().max() <= 1e-4 * (1 + whole.abs().max())
    tokens = range(x.activations.shape[1])
    alone = [Factors(x.activations[:, [t]], x.output_gradients[:, [t]], x.bias) for t in tokens]
    assert (sum(map(drawn.apply, alone)) - whole).abs().max() <= 1e-4 * (1 + whole.abs().max())


@given(st.integers(1, 40), st.integers(1, 200), seeds)
def test_a_longer_projection_begins_with_the_shorter_one(rows, columns, seed):
    bits = projection.sign_bits(rows, columns, seed)
    assert bits.shape == (rows, -(-columns // 8))
    np.testing.assert_array_equal(projection.sign_bits(rows + 3, columns, seed)[:rows], bits)
    dense = projection.Rademacher(rows, columns, seed).block(0, rows)
    assert set(dense.unique().tolist()) <= {-1.0, 1.0}


@given(factors(), factors())
def test_the_exact_kernel_is_the_inner_product(x, y):
    if sizes(x) != sizes(y) or x.bias != y.bias:
        y = x
    expected = x.gradient().flatten(1).double() @ y.gradient().flatten(1).double().T
    found = projection.exact_kernel(x, y)
    assert (found - expected).abs().max() <= 1e-4 * (1 + expected.abs().max())


# --- nearest neighbours


grid = hnp.arrays(
    np.int64, st.tuples(st.integers(2, 40), st.integers(1, 3)), elements=st.integers(-2, 2)
)


@given(grid, seeds, st.data())
def test_equally_similar_rows_come_in_the_memorys_order_and_tied_votes_to_the_lowest_label(
    train, seed, data
):
    """On a small grid nearly every distance is tied; the oracle sorts exact integers in Python."""
    test = data.draw(hnp.arrays(np.int64, (5, train.shape[1]), elements=st.integers(-2, 2)))
    k = data.draw(st.integers(1, len(train)))
    labels = np.random.default_rng(seed).integers(-2, 3, len(train))
    exact = ((test[:, None] - train) ** 2).sum(2)
    expected = []
    for row in exact.tolist():
        near = sorted(range(len(row)), key=lambda i, row=row: (row[i], i))[:k]
        votes = labels[near].tolist()
        expected.append(min({*votes}, key=lambda one, votes=votes: (-votes.count(one), one)))
    assert evaluate.knn_by_similarity(-exact.astype(float), labels, k).tolist() == expected


@given(
    hnp.arrays(
        np.int64, st.tuples(st.integers(1, 6), st.integers(1, 9)), elements=st.integers(0, 8)
    ),
    seeds,
)
def test_a_tied_vote_goes_to_the_lowest_label(near, seed):
    labels = np.random.default_rng(seed).integers(-2, 3, 9)
    expected = [
        min(set(row), key=lambda label: (-row.count(label), label)) for row in labels[near].tolist()
    ]
    assert evaluate.vote(near, labels).tolist() == expected


@given(st.integers(1, 200), st.integers(1, 3), seeds, st.data())
def test_a_search_finds_the_largest_products_however_its_queries_are_cut(rows, width, seed, data):
    """Small integers: exact products, many ties, and both ways of `search._top`."""
    rng = generator("search", seed)
    keys, queries = (
        torch.from_numpy(rng.integers(-3, 4, (n, width)).astype(np.float32)) for n in (rows, 7)
    )
    k = data.draw(st.integers(1, min(rows, 8)))
    values, indices = search.nearest(queries, keys, k)
    exact = (queries @ keys.T).numpy()
    np.testing.assert_array_equal(values, -np.sort(-exact, 1)[:, :k])
    np.testing.assert_array_equal(np.take_along_axis(exact, indices.numpy(), 1), values)
    assert all(len({*row}) == k for row in indices.tolist())
    alone = torch.cat([search.nearest(query[None], keys, k)[0] for query in queries])
    assert torch.equal(alone, values)


# --- CKA


@given(st.integers(4, 60), st.integers(1, 6), st.integers(1, 6), st.booleans(), seeds, st.data())
def test_cka_of_merged_shards_is_that_of_all_rows(n, p, q, unbiased, seed, data):
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((n, p)), rng.standard_normal((n, q))
    y[:, :1] += x[:, :1]
    whole = LinearCKA(unbiased)
    whole.update(x, y)
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=5)))
    order, metrics = rng.permutation(n), []
    for low, high in zip([0, *cuts], [*cuts, n]):
        if low < high:
            metrics.append(LinearCKA(unbiased))
            metrics[-1].update(x[order[low:high]], y[order[low:high]])
    for other in metrics[1:]:
        metrics[0].merge_state(other)
    try:
        expected = float(whole.compute())
    except ValueError:  # no spread: then none in the parts either
        return
    np.testing.assert_allclose(float(metrics[0].compute()), expected, rtol=1e-6, atol=1e-6)
    assert expected <= 1 + 1e-9


# --- store


@given(st.integers(1, 900), st.integers(1, 4), st.data())
def test_a_store_filled_in_any_pieces_with_any_interruptions_is_the_same(n, width, data):
    """Blocks of any size in any order, some lost with the lock, damaged shards in between: the same
    bytes at last.
    """
    values = np.random.default_rng(n).standard_normal((n, width)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        undisturbed = store.open_entry({"n": n}, n, width, Path(folder, "undisturbed"))
        with undisturbed.lock():
            undisturbed.write(0, values)
        rows = store.open_entry({"n": n}, n, width, Path(folder, "store"))
        for _ in range(data.draw(st.integers(0, 4))):
            with rows.lock():
                for _ in range(data.draw(st.integers(0, 3))):
                    start = data.draw(st.integers(0, n - 1))
                    rows.write(start, values[start : start + data.draw(st.integers(1, 600))])
            there = sorted(rows.path.glob("*.npy")) if rows.path.is_dir() else []
            if there and data.draw(st.booleans()):
                file = data.draw(st.sampled_from(there))
                content = bytearray(file.read_bytes())
                content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(
                    st.integers(1, 255)
                )
                file.write_bytes(content)
                assert rows.drop_corrupt() == [file.name]
        gaps = rows.missing()
        assert all(low < high for low, high in gaps) and all(
            a[1] < b[0] for a, b in zip(gaps, gaps[1:])
        )
        with rows.lock():
            for low, high in gaps:  # what extraction does
                rows.write(low, values[low:high])
        np.testing.assert_array_equal(rows.read(), values)
        content = lambda folder: {file.name: file.read_bytes() for file in folder.iterdir()}
        assert content(rows.path) == content(undisturbed.path)


@given(st.integers(1, 2000), st.integers(1, 9))
def test_ranges_of_separate_jobs_cover_every_row_once(n, jobs):
    """Cut anywhere at whole files, empty parts included: together all rows, each missing before and
    not after.
    """
    files = -(-n // store.SHARD)
    edges = [min(n, round(i * files / jobs) * store.SHARD) for i in range(jobs + 1)]
    with tempfile.TemporaryDirectory() as folder:
        rows = store.open_entry({"n": n}, n, 1, Path(folder))
        values = np.arange(n, dtype=np.float32)[:, None]
        for low, high in zip(edges, edges[1:]):
            with rows.lock(low, high):
                assert rows.missing(low, high) == ([(low, high)] if low < high else [])
                rows.write(low, values[low:high])
        np.testing.assert_array_equal(rows.read(), values)

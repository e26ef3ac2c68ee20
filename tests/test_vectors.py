"""Determinism across machines: what a seed draws is the same bit for bit, features are the same
within 1e-4.
"""

import json

import numpy as np
import pytest
import torch
import vectors

EXPECTED = json.loads(vectors.FILE.read_text())


def test_one_seed_draws_the_same_views_heads_negatives_and_projections_on_every_machine():
    found = json.loads(json.dumps(vectors.exact()))
    differing = [name for name in EXPECTED["exact"] if found.get(name) != EXPECTED["exact"][name]]
    assert differing == [] and found.keys() == EXPECTED["exact"].keys()


def check() -> None:
    found = vectors.features()
    assert found.keys() == EXPECTED["features"].keys() == {"embedding", "kl", "dino", "simclr"}
    for name, rows in EXPECTED["features"].items():
        rows = np.array(rows)
        assert rows.shape == found[name].shape == (3, 128) and found[name].dtype == np.float32
        off = np.linalg.norm(found[name] - rows, axis=1) / np.linalg.norm(rows, axis=1)
        assert off.max() <= 1e-4, (name, off)


@pytest.mark.parametrize("threads", [1, 2])
def test_features_in_float32_are_the_same_within_a_ten_thousandth(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check()
    finally:
        torch.set_num_threads(before)


def test_the_check_can_fail(monkeypatch):
    monkeypatch.setattr(vectors, "SEED", 1)
    assert vectors.exact() != EXPECTED["exact"]
    with pytest.raises(AssertionError):
        check()

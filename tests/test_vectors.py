"""Determinism across machines: what a seed draws is the same bit for bit."""

import json

import vectors

EXPECTED = json.loads(vectors.FILE.read_text())


def test_one_seed_draws_the_same_views_heads_negatives_and_projections_on_every_machine():
    found = json.loads(json.dumps(vectors.exact()))
    differing = [name for name in EXPECTED if found.get(name) != EXPECTED[name]]
    assert differing == [] and found.keys() == EXPECTED.keys()


def test_the_check_can_fail(monkeypatch):
    monkeypatch.setattr(vectors, "SEED", 1)
    assert vectors.exact() != EXPECTED

"""The revisited Oxford/Paris protocol: numbers worked by hand, a naive loop, torchmetrics, and
hostile pickles.
"""

import os
import pickle

import numpy as np
import pytest
import torch
from torchmetrics.retrieval import RetrievalMAP

from companion.data import landmarks
from companion.evaluate import retrieval

NONE = np.empty(0, np.int64)
# ranks            0  1  2  3  4  5  6  7
RANKING = np.array([4, 0, 6, 1, 7, 2, 5, 3])
TRUTH = {
    "easy": np.array([0, 2]),
    "hard": np.array([1, 5]),
    "junk": np.array([4]),
}  # 3, 6, 7: other landmarks


@pytest.mark.parametrize(
    ("protocol", "by_hand"),
    [
        # junk 4 out: 0 6 1 7 2 5 3, positives 0 1 2 5 at ranks 0 2 4 5; precision before and at
        # each:
        # (1, 1) (1/2, 2/3) (2/4, 3/5) (3/5, 4/6)
        ("medium", ((1 + 1) + (1 / 2 + 2 / 3) + (1 / 2 + 3 / 5) + (3 / 5 + 2 / 3)) / 2 / 4),
        # 4, and the hard 1, 5 out: 0 6 7 2 3, positives 0 2 at ranks 0 3: (1, 1) (1/3, 2/4)
        ("easy", ((1 + 1) + (1 / 3 + 1 / 2)) / 2 / 2),
        # 4, and the easy 0, 2 out: 6 1 7 5 3, positives 1 5 at ranks 1 3: (0, 1/2) (1/3, 2/4)
        ("hard", ((0 + 1 / 2) + (1 / 3 + 1 / 2)) / 2 / 2),
    ],
)
def test_a_ranking_worked_by_hand(protocol, by_hand):
    assert retrieval.scores([RANKING], [TRUTH], protocol)[0] == pytest.approx(by_hand, abs=1e-12)


def test_the_ends_of_the_scale():
    truth = {"easy": np.array([0, 1]), "hard": NONE, "junk": NONE}
    best, worst = retrieval.scores([[0, 1, 2, 3], [2, 3, 0, 1]], [truth, truth])
    assert best == 1
    assert worst == pytest.approx(((0 + 1 / 3) + (1 / 3 + 2 / 4)) / 2 / 2)
    assert np.isnan(
        retrieval.scores([[0, 1]], [{"easy": NONE, "hard": NONE, "junk": np.array([0])}])[0]
    )
    assert np.isnan(
        retrieval.scores([[0, 1]], [{"easy": np.array([0]), "hard": NONE, "junk": NONE}], "hard")[0]
    )
    assert retrieval.average_precision([0], 2) == 0.5  # a shortlist that misses one positive


def naive(ranking, truth, protocol):
    """The same, one database image after the other."""
    positive, ignored = (
        sum((list(truth[k]) for k in keys), []) for keys in retrieval.PROTOCOLS[protocol]
    )
    seen = found = area = 0
    for row in ranking:
        if row in ignored:
            continue
        if row in positive:
            before = found / seen if seen else 1
            area += (before + (found + 1) / (seen + 1)) / 2 / len(positive)
            found += 1
        seen += 1
    return area


def random_truth(g, n):
    kind = g.choice(4, n, p=[0.1, 0.1, 0.2, 0.6])
    return {key: np.flatnonzero(kind == i) for i, key in enumerate(("easy", "hard", "junk"))}


@pytest.mark.parametrize("protocol", retrieval.PROTOCOLS)
def test_random_rankings_against_a_naive_loop_and_torchmetrics(protocol):
    """torchmetrics reads precision at each positive only, without the trapezoid's left side, and
    knows no junk: on the ranking without junk it is the right side of ours, and ours is the mean of
    both sides.
    """
    g = np.random.default_rng(0)
    truths = [random_truth(g, 80) for _ in range(12)]
    rankings = np.stack([g.permutation(80) for _ in truths])
    ours = retrieval.scores(rankings, truths, protocol)
    np.testing.assert_allclose(
        ours, [naive(r, t, protocol) for r, t in zip(rankings, truths)], atol=1e-12
    )
    right, left = [], []
    for ranking, truth in zip(rankings, truths):
        positive, ignored = (
            np.concatenate([truth[k] for k in keys]) for keys in retrieval.PROTOCOLS[protocol]
        )
        relevant = torch.tensor(np.isin(ranking[~np.isin(ranking, ignored)], positive))
        falling = torch.linspace(1, 0.1, len(relevant))
        right.append(
            float(
                RetrievalMAP()(
                    falling, relevant, indexes=torch.zeros(len(relevant), dtype=torch.long)
                )
            )
        )
        hits = np.cumsum(relevant.numpy()) - 1
        left.append(np.mean([hits[i] / i if i else 1 for i in np.flatnonzero(relevant.numpy())]))
    np.testing.assert_allclose(ours, (np.array(right) + left) / 2, atol=1e-6)


def test_torchmetrics_agrees_outright_where_all_positives_come_first():
    truth = {"easy": np.array([5, 2, 7]), "hard": NONE, "junk": np.array([1])}
    ranking = [2, 1, 7, 5, 0, 3, 4, 6]
    kept = torch.tensor([row in (5, 2, 7) for row in ranking if row != 1])
    index = torch.zeros(len(kept), dtype=torch.long)
    expected = float(RetrievalMAP()(torch.linspace(1, 0, len(kept)), kept, indexes=index))
    assert retrieval.scores([ranking], [truth])[0] == pytest.approx(expected) == 1


def test_junk_is_as_if_it_were_not_in_the_database():
    g = np.random.default_rng(1)
    truth, ranking = random_truth(g, 60), g.permutation(60)
    without = ranking[~np.isin(ranking, truth["junk"])]
    a, b = retrieval.scores([ranking, ranking], [truth, truth | {"junk": NONE}])
    assert (
        a == retrieval.scores([without], [truth])[0] and a > b
    )  # junk that counted as wrong would cost


def test_rank_is_by_cosine_and_ties_keep_the_databases_order():
    database = np.array([[0.0, 2.0], [3.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0], [0.0, 0.0]])
    ranking = retrieval.rank([[1.0, 0.0], [0.0, 5.0]], database)
    assert ranking.tolist() == [[1, 3, 0, 2, 5, 4], [0, 2, 3, 1, 4, 5]]


def test_labels_as_ground_truth():
    truth = retrieval.same_class([1, 0, 1], [0, 1, 1, 2])
    assert [t["easy"].tolist() for t in truth] == [[1, 2], [0], [1, 2]]
    assert all(not len(t["hard"]) and not len(t["junk"]) for t in truth)
    ranking = np.array([[1, 0, 2, 3]] * 3)
    assert np.array_equal(*(retrieval.scores(ranking, truth, name) for name in ("easy", "medium")))
    with pytest.raises(ValueError, match="unknown protocol 'm'; there are easy, medium, hard"):
        retrieval.scores(ranking, truth, "m")
    with pytest.raises(ValueError, match="shorter than argument 1"):
        retrieval.scores(ranking, truth[:1])


# --- the ground truth file


def content():
    lists = [
        {"easy": [0], "hard": [1, 2], "junk": [], "bbx": [1.5, 2.0, 3.0, 4.0]},
        {k: [3] for k in TRUTH},
    ]
    return {"imlist": ["a", "b", "c", "d"], "qimlist": ["q", "r"], "gnd": lists}


@pytest.mark.parametrize("python2", [False, True])
@pytest.mark.parametrize("arrays", [False, True])
def test_the_official_layout_is_read(tmp_path, arrays, python2):
    made = content()
    if arrays:
        made["gnd"] = [{k: np.array(v) for k, v in q.items()} for q in made["gnd"]]
        made["gnd"][0]["bbx"] = list(np.array([1.5, 2.0]))  # scalars of NumPy's
    (tmp_path / "gnd.pkl").write_bytes(pickle.dumps(made, protocol=2 if python2 else 4))
    known = landmarks.ground_truth(tmp_path / "gnd.pkl")
    assert known["imlist"] == ["a", "b", "c", "d"] and known["qimlist"] == ["q", "r"]
    assert [{k: v.tolist() for k, v in q.items()} for q in known["gnd"]] == [
        {"easy": [0], "hard": [1, 2], "junk": []},
        {"easy": [3], "hard": [3], "junk": [3]},
    ]
    assert known["gnd"][0]["junk"].dtype == np.int64


class Hostile:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "call", [(os.system, "touch hit"), (eval, "open('hit', 'w')"), (getattr, "x", "upper")]
)
def test_a_pickle_that_calls_something_is_refused_in_one_line(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gnd.pkl").write_bytes(pickle.dumps(content() | {"imlist": Hostile(*call)}))
    with pytest.raises(
        ValueError, match=r"gnd.pkl is no ground truth.*it names .*only plain lists"
    ) as caught:
        landmarks.ground_truth(tmp_path / "gnd.pkl")
    assert "\n" not in str(caught.value) and not (tmp_path / "hit").exists()


@pytest.mark.parametrize("fault", ["text", "cut", "keys", "rows", "queries", "objects"])
def test_a_broken_file_is_one_line(tmp_path, fault):
    made = content()
    if fault == "keys":
        del made["gnd"][0]["hard"]
    elif fault == "rows":
        made["gnd"][0]["hard"] = [4]
    elif fault == "queries":
        made["qimlist"].append("s")
    elif fault == "objects":
        made["gnd"][0]["hard"] = ["a"]
    raw = b"no pickle" if fault == "text" else pickle.dumps(made)
    (tmp_path / "gnd.pkl").write_bytes(raw[:-20] if fault == "cut" else raw)
    with pytest.raises(ValueError, match="gnd.pkl") as caught:
        landmarks.ground_truth(tmp_path / "gnd.pkl")
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError):
        landmarks.ground_truth(tmp_path / "absent.pkl")

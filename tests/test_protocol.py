"""The evaluation protocol on small synthetic rows, and the scoreboard's rules."""

import pickle
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier

from companion import paper, protocol, studies
from companion.data import landmarks
from companion.data.images import Images
from companion.evaluate import clustering, probe, retrieval
from companion.evaluate import knn as evaluate
from fungi_core import extract
from fungi_core.features import normalize
from fungi_core.seeds import generator


def rows(n, seed, informative="kl", metric="accuracy"):
    """Four classes; only the block ``informative`` knows the class, the others are noise."""
    g = np.random.default_rng(seed)
    labels = np.arange(n) % 4
    blocks = {
        name: g.normal(size=(n, 12)).astype(np.float32)
        for name in ("embedding", "kl", "dino", "simclr")
    }
    blocks[informative][np.arange(n), labels] += 6
    names = [str(i) for i in range(n)]
    data = Images(
        "toy", "test", labels, list("abcd"), metric, names, [None] * n, np.arange(n), "", ""
    )
    return extract.Features(data, blocks, ("key",))


def test_accuracies_are_scikit_learns_with_the_papers_pipeline():
    train, test = rows(200, 0), rows(120, 1)
    table = protocol.over_seeds([(train, test)], k=20, pca=12).set_index("features")
    joined = {}
    for name, split in (("train", train), ("test", test)):
        blocks = [b / np.linalg.norm(b, axis=1, keepdims=True) for b in split.blocks.values()]
        joined[name] = np.concatenate([blocks[1], blocks[2], blocks[3], blocks[0]], 1)
    pca = PCA(12, svd_solver="full").fit(joined["train"])
    model = KNeighborsClassifier(20).fit(pca.transform(joined["train"]), train.labels)
    expected = 100 * model.score(pca.transform(joined["test"]), test.labels)
    assert table.loc["E+K+D+S", "value"] == pytest.approx(
        expected, abs=0.9
    )  # one test image at most
    alone = KNeighborsClassifier(20).fit(normalize(train.blocks["embedding"]), train.labels)
    assert table.loc["E", "value"] == pytest.approx(
        100 * alone.score(normalize(test.blocks["embedding"]), test.labels)
    )


def test_gains_and_steps_are_paired_differences_with_intervals_around_them():
    table = protocol.over_seeds([(rows(200, 0), rows(120, 1))], k=20).set_index("features")
    e = table.loc["E"]
    assert (e["gain"], e["gain_low"], e["gain_high"], e["step"]) == (0, 0, 0, 0)
    previous = "E"
    for name in protocol.COMBINATIONS[1:]:
        row = table.loc[name]
        assert row["gain"] == pytest.approx(row["value"] - e["value"])
        assert row["step"] == pytest.approx(row["value"] - table.loc[previous, "value"])
        for q, low, high in (
            ("value", "low", "high"),
            ("gain", "gain_low", "gain_high"),
            ("step", "step_low", "step_high"),
        ):
            assert row[low] <= row[q] <= row[high]
        previous = name
    assert table.loc["E+K", "gain_low"] > 10  # the KL block alone knows the class


def test_variants_are_compared_on_the_same_images():
    good, bad = (rows(200, 0), rows(120, 1)), (rows(200, 0, "dino"), rows(120, 1, "dino"))
    table = protocol.variants({"ours": good, "noise": bad}, "K", "ours").set_index("variant")
    alone = protocol.over_seeds([good], ["K"]).set_index("features")
    assert table.loc["ours", "value"] == alone.loc["K", "value"]
    assert tuple(table.loc["ours", ["gain", "gain_low", "gain_high"]]) == (0, 0, 0)
    row = table.loc["noise"]
    assert row["gain"] == pytest.approx(row["value"] - table.loc["ours", "value"])
    assert row["gain_low"] < row["gain"] < row["gain_high"] < -10


def effects(values, error=1.0):
    half = 1.959964 * error
    values = np.array(values, float)
    gains = {"gain": values, "gain_low": values - half, "gain_high": values + half}
    return pd.DataFrame({"backbone": "vit"} | gains)


def test_gains_on_unlike_data_sets_have_a_wide_random_effects_mean():
    """Worked by hand: effects 0 and 4, standard errors 1: Q = 8, so the variance between them is 7;
    Hartung and Knapp's standard error is 2, and t with one degree of freedom 12.706.
    """
    mean, low, high, between = evaluate.random_effects(*effects([0, 4])[protocol.GAIN].to_numpy().T)
    assert (mean, between) == pytest.approx((2, np.sqrt(7)), rel=1e-5)
    assert (low, high) == pytest.approx((2 - 2 * 12.7062, 2 + 2 * 12.7062), rel=1e-5)
    assert protocol.pooled(effects([0, 4])) == (mean, low, high)


def test_gains_that_are_alike_keep_the_interval_of_equal_effects():
    mean, low, high = protocol.pooled(effects([1, 1, 1]))
    assert (mean, high - 1, 1 - low) == pytest.approx((1, *[1.959964 / np.sqrt(3)] * 2), rel=1e-5)
    assert protocol.pooled(effects([2.5])) == pytest.approx((2.5, 2.5 - 1.96, 2.5 + 1.96), abs=1e-3)
    assert protocol.pooled(effects([0, 0], 0)) == (0, 0, 0)  # the embedding against itself


def test_a_data_set_where_no_image_changed_sides_does_not_take_all_the_weight():
    """Its interval has no width: it counts as the narrowest of the others."""
    found = protocol.pooled(effects([0, 2, 4], np.array([0, 1, 1])))
    assert found == pytest.approx(protocol.pooled(effects([0, 2, 4])))


def test_two_networks_on_the_same_images_are_no_twice_as_many_data_sets():
    """Their means are 1 and 3; half-widths as those of one network: by column or by index."""
    both = pd.concat([effects([x] * 3).assign(backbone=name) for name, x in (("a", 1), ("b", 3))])
    half = 1.959964 / np.sqrt(3)
    for frame in (both, both.set_index("backbone")):
        assert protocol.pooled(frame) == pytest.approx((2, 2 - half, 2 + half), rel=1e-5)


def test_intervals_over_seeds_and_images_are_those_of_slow_resampling():
    """The crossed bootstrap, drawn one by one, seeds stretched by sqrt(S / (S - 1))."""
    draw = np.random.default_rng(0)
    hits = draw.random((3, 120)) < np.array([[0.5], [0.6], [0.7]])
    fast = evaluate.bootstrap(hits, n=20000, generator=np.random.default_rng(1))
    means = []
    for _ in range(20000):
        by_seed = hits[:, draw.integers(0, 120, 120)].mean(1)
        seen = by_seed[draw.integers(0, 3, 3)].mean() - by_seed.mean()
        means.append(100 * (by_seed.mean() + seen * np.sqrt(3 / 2)))
    assert fast.mean == pytest.approx(100 * hits.mean())
    assert fast[1:] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.5)
    images = evaluate.bootstrap(hits.mean(0), generator=np.random.default_rng(1))
    assert fast.high - fast.low > 1.2 * (images.high - images.low)  # the seeds differ
    same = np.repeat(hits[:1], 3, 0)  # no seed makes a difference: images alone
    alone = evaluate.bootstrap(hits[0], n=20000, generator=np.random.default_rng(2))
    again = evaluate.bootstrap(same, n=20000, generator=np.random.default_rng(3))
    assert again == pytest.approx(alone, abs=0.5)


def test_one_seed_gives_the_interval_over_images_to_the_bit():
    train, test = rows(200, 0), rows(117, 1)
    one = protocol.over_seeds([(train, test)], k=5, shots=5)
    pd.testing.assert_frame_equal(one, protocol.over_folds([(train, test)], k=5, shots=5))
    text = protocol.outcomes(protocol.hits([(train, test)], ["E+K"], k=5), protocol.metric(test), 7)
    assert text["features"].tolist() == ["E", "E+K"] and set(text["seed"]) == {7}
    right = protocol.right_or_wrong(train, test, "E+K", 5, None)
    assert [digit == "1" for digit in text["correct"][1]] == right.tolist()


@pytest.mark.parametrize("metric", ["accuracy", "mean-per-class"])
def test_seed_spread_is_mean_and_population_deviation_of_each_seed(metric):
    pairs = []
    for seed in range(3):  # the embedding is the same for all seeds, the gradients are not
        train, test = rows(200, 0, metric=metric), rows(117, 1, metric=metric)
        noise = np.random.default_rng(seed).normal(size=(200 + 117, 12)).astype(np.float32) * (
            1 + seed
        )
        train.blocks["kl"][:], test.blocks["kl"][:] = (
            train.blocks["kl"] + noise[:200],
            test.blocks["kl"] + noise[200:],
        )
        pairs.append((train, test))
    table = studies.seed_spread(pairs, ["E", "E+K"]).set_index("features")
    each = [protocol.over_seeds([pair], ["E", "E+K"]).set_index("features") for pair in pairs]
    for name in ("E", "E+K"):
        values, gains = ([t.loc[name, column] for t in each] for column in ("value", "gain"))
        row = table.loc[name]
        assert row["value"] == pytest.approx(np.mean(values)) and row["spread"] == pytest.approx(
            np.std(values)
        )
        assert row["gain"] == pytest.approx(np.mean(gains)) and row["gain_spread"] == pytest.approx(
            np.std(gains)
        )
        assert row["gain_low"] <= row["gain"] <= row["gain_high"]
    assert table.loc["E", "spread"] == 0 < table.loc["E+K", "spread"]


@pytest.mark.parametrize("shots", [None, 5])
def test_linear_probe_is_split_choice_and_refit_on_the_joined_features(shots):
    train, test = rows(200, 0), rows(120, 1)
    table = studies.linear([(train, test)], ["E", "E+K"], shots=shots, pca=12, seed=4).set_index(
        "features"
    )
    used = train.take(np.arange(20)) if shots else train
    joined = [
        np.hstack([normalize(r.blocks[b]) for b in ("embedding", "kl")]) for r in (used, test)
    ]
    pca = PCA(12, svd_solver="full").fit(joined[0])
    expected, strength = probe.predict(
        pca.transform(joined[0]), used.labels, pca.transform(joined[1]), seed=4
    )
    assert table.loc["E+K", "value"] == pytest.approx(
        100 * np.mean(expected == test.labels), abs=0.9
    )
    assert table.loc["E+K", "strength"] == strength
    assert table.loc["E+K", "gain"] == pytest.approx(
        table.loc["E+K", "value"] - table.loc["E", "value"]
    )
    assert table.loc["E+K", "gain_low"] > 10 and table.loc["E", "gain"] == 0
    assert set(table["setting"]) == {f"{shots}-shot" if shots else "full"}


def test_retrieval_among_classes_is_torchmetrics_at_the_right_side_of_each_positive():
    train, test = rows(80, 0), rows(24, 1)
    table = studies.retrieve([(train, test)], ["E", "K", "E+K"]).set_index("features")
    a, b = (normalize(r.blocks["kl"]) for r in (test, train))
    order = np.argsort(-(a @ b.T), 1)
    hits = (train.labels[order] == test.labels[:, None]).astype(
        float
    )  # (queries, database), best first
    found, place = hits.cumsum(1), np.arange(1, 81)
    before = np.where(place > 1, (found - hits) / np.maximum(place - 1, 1), 1)
    by_hand = (hits * (found / place + before) / 2).sum(1) / hits.sum(1)
    assert table.loc["K", "value"] == pytest.approx(100 * by_hand.mean(), abs=1e-3)
    assert table.loc["K", "gain"] == pytest.approx(
        table.loc["K", "value"] - table.loc["E", "value"]
    )
    assert table.loc["E+K", "gain_low"] > 10 and set(table["setting"]) == {"same class"}
    assert table.loc["E", "low"] <= table.loc["E", "value"] <= table.loc["E", "high"]


def test_retrieval_of_landmarks_takes_their_ground_truth(monkeypatch, tmp_path):
    monkeypatch.setenv("FUNGI_DATA", str(tmp_path))
    train, test = rows(9, 0, metric="mAP"), rows(3, 1, metric="mAP")
    own = {"easy": [4], "hard": [2, 7], "junk": [0, 1]}
    truth = {
        "imlist": list("abcdefghi"),
        "qimlist": list("xyz"),
        "gnd": [own, own, own | {"hard": []}],
    }
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "gnd_toy.pkl").write_bytes(pickle.dumps(truth))
    table = studies.retrieve([(train, test)], ["E", "E+K"]).set_index(["setting", "features"])
    order = retrieval.rank(
        normalize(test.blocks["embedding"]), normalize(train.blocks["embedding"])
    )
    for name in ("medium", "hard"):
        scores = retrieval.scores(
            order, landmarks.ground_truth(tmp_path / "toy" / "gnd_toy.pkl")["gnd"], name
        )
        assert np.isnan(scores).tolist() == [
            False,
            False,
            name == "hard",
        ]  # a query without positives is left out
        assert table.loc[(name, "E"), "value"] == pytest.approx(100 * np.nanmean(scores))
    with pytest.raises(ValueError, match="toy is scored whole: set n_train and n_test to 0"):
        studies.retrieve([(train.take(np.arange(5)), test)], ["E"])


def test_clustering_of_the_block_that_knows_the_class_is_right_and_the_same_every_time():
    train, test = rows(60, 0), rows(80, 1)
    table = studies.cluster([(train, test)], ["E", "K", "E+K"], runs=3, seed=2).set_index(
        "features"
    )
    assert (
        table.loc["K", "value"] > 95 and table.loc["K", "nmi"] > 85 and table.loc["E", "nmi"] < 30
    )
    assert table.loc["K", "gain"] == pytest.approx(
        table.loc["K", "value"] - table.loc["E", "value"]
    )
    assert table.loc["K", "gain_low"] > 20 and 25 <= table.loc["E", "value"] < 60
    seeds = generator("kmeans", 2).integers(2**31, size=3).tolist()
    x = normalize(test.blocks["embedding"])
    scores = []
    for s in seeds:
        named = clustering.match(
            KMeans(4, n_init=10, random_state=s).fit_predict(x.astype(float)), test.labels
        )
        scores.append(100 * np.mean(named == test.labels))
    assert table.loc["E", ["value", "spread"]].tolist() == pytest.approx(
        [np.mean(scores), np.std(scores)]
    )
    pd.testing.assert_frame_equal(
        table, studies.cluster([(train, test)], table.index, runs=3, seed=2).set_index("features")
    )


def test_few_shot_uses_the_first_images_of_each_class_only():
    train, test = rows(200, 0), rows(120, 1)
    few = protocol.over_seeds([(train, test)], ["K"], k=3, shots=5)
    by_hand = evaluate.knn_predict(
        normalize(train.blocks["kl"][:20]),
        train.labels[:20],
        normalize(test.blocks["kl"]),
        k=3,
    )
    assert (
        few["value"][0] == pytest.approx(100 * np.mean(by_hand == test.labels))
        and few["setting"][0] == "5-shot"
    )


def test_adding_a_feature_set_does_not_move_another_ones_interval():
    train, test = rows(100, 0), rows(60, 1)
    short = protocol.over_seeds([(train, test)], ["E", "E+K"], k=5).set_index("features")
    long = protocol.over_seeds([(train, test)], ["E", "E+K", "E+S"], k=5).set_index("features")
    pd.testing.assert_frame_equal(short, long.loc[["E", "E+K"]])


def test_pairs():
    train, test = rows(80, 0), rows(60, 1)
    frame = studies.joined_pairs([(train, test)], k=5, pca=12)
    assert len(frame) == 10 and (frame.query("a == b")["cka"] == 1).all()
    assert frame["a"].unique().tolist() == ["E", "K", "D", "S"] and frame["value"].notna().all()
    alone = frame.query("a == b").set_index("a")["value"]
    row = frame.query("a == 'E' and b == 'K'").iloc[0]
    assert row["gain"] == pytest.approx(row["value"] - max(alone["E"], alone["K"]))
    for letters, value in [
        *alone.items(),
        ("E+K", row["value"]),
    ]:  # one PCA size for features alone and joined
        assert value == 100 * protocol.right_or_wrong(train, test, letters, 5, 12).mean()


def test_pairs_of_one_data_set_are_drawn_together():
    """Two data sets of opposite slopes: drawn with all their pairs, the interval has both ends."""
    up = pd.DataFrame({"a": list("EEK"), "b": list("KDD"), "cka": [0.1, 0.2, 0.3]})
    pairs = pd.concat(
        [
            up.assign(gain=[1.0, 2.0, 3.0], dataset="rising"),
            up.assign(gain=[3.0, 2.0, 1.0], dataset="falling"),
            up.assign(a="E", b="E", gain=50.0, dataset="falling"),  # one feature alone is no pair
        ]
    )
    value, low, high = studies.diversity(pairs)
    assert value == pytest.approx(0) and (low, high) == pytest.approx((-1, 1))
    value, low, high = studies.diversity(pairs[pairs["dataset"] == "rising"])
    assert value == pytest.approx(1) and (low, high) == (-1, 1)  # nothing is known of other sets


def test_class_gains_sum_to_the_gain_on_a_balanced_set():
    train, test = rows(80, 0), rows(60, 1)
    frame = protocol.class_gains([(train, test)], ["K"], k=5)
    table = protocol.over_seeds([(train, test)], ["E", "K"], k=5).set_index("features")
    assert frame["value"].mean() == pytest.approx(table.loc["K", "gain"])


def test_means_add_independent_errors_in_squares_and_shared_ones_as_they_are():
    quantities = {q: [0.0, 2.0] for q in protocol.QUANTITIES}
    quantities |= {
        "value": [10.0, 20.0],
        "low": [7.0, 16.0],
        "high": [13.0, 24.0],
    }  # half-widths 3 and 4
    frame = pd.DataFrame({"backbone": "b", "setting": "full", "features": "E", **quantities})
    apart = protocol.mean_over(frame).iloc[0]
    assert (apart["value"], apart["high"] - apart["value"]) == (15, 2.5)  # sqrt(9 + 16) / 2
    together = protocol.mean_over(frame, shared=True).iloc[0]
    assert together["high"] - together["value"] == 3.5


def test_missing_lists_what_is_absent_and_unknown_names_raise(monkeypatch, tmp_path):
    monkeypatch.setenv("FUNGI_DATA", str(tmp_path))
    encoders = [
        "vit_base_patch16_224.dino",
        "random:test_vit",
        "vit_b_16.moco_v3",
        "vit_base_patch16_224.dino",
    ]
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    lacking = protocol.missing(encoders, ["digits", "flowers102", "roxford5k"]).set_index("name")
    assert lacking.columns.tolist() == ["size", "licence", "how to get it"]
    assert lacking.loc["flowers102"].tolist() == [
        "0.35 GB",
        "Unknown",
        f"torchvision.datasets.Flowers102('{tmp_path}', download=True)",
    ]
    size, licence, get = lacking.loc["vit_base_patch16_224.dino"]
    assert (size, licence) == ("0.34 GB", "Apache 2.0")
    assert get == "hf download timm/vit_base_patch16_224.dino"
    assert lacking.loc["vit_b_16.moco_v3", "how to get it"].startswith(
        "into checkpoints: https://dl.fbaipublicfiles"
    )
    assert lacking.index.tolist() == [
        "flowers102",
        "roxford5k",
        "vit_base_patch16_224.dino",
        "vit_b_16.moco_v3",
    ]
    assert "gnd_roxford5k.pkl" in lacking.loc["roxford5k", "how to get it"]
    with pytest.raises(ValueError, match="unknown data set 'flowers'.*digits"):
        protocol.missing([], ["flowers"])
    with pytest.raises(ValueError, match="unknown backbone 'vit_huge_lala'.*vit_mini.sup_tin100"):
        protocol.missing(["vit_huge_lala"], [])


def test_here_is_what_can_be_run_and_ends_the_notebook_where_nothing_can(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("FUNGI_DATA", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    dino, ours = "vit_base_patch16_224.dino", "vit_micro.sup_tin100"
    assert (
        protocol.here([ours], ["digits"]) == ([ours], ["digits"]) and capsys.readouterr().out == ""
    )
    shown = []
    monkeypatch.setattr(protocol, "display", shown.append)
    assert protocol.here([dino, ours], ["flowers102", "digits"]) == ([ours], ["digits"])
    (table_of_them,) = shown
    said = table_of_them.to_html()
    assert "hf download timm/vit_base_patch16_224.dino" in said
    assert "torchvision.datasets.Flowers102(" in said
    assert protocol.here([ours]) == ([ours], [])
    for encoders, sets in (([dino], ["digits"]), ([ours], ["flowers102"]), ([dino], None)):
        with pytest.raises(SystemExit) as ended:
            protocol.here(encoders, sets)
        assert ended.value.code == 0 and "Nothing can be run here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("expected", "value", "low", "high", "on", "verdict"),
    [
        ("+", 2.0, 1.0, 3.0, "x", "agrees"),
        ("+", -2.0, -3.0, -1.0, "x", "disagrees"),
        ("-", -2.0, -3.0, -1.0, "x", "agrees"),
        ("-", 2.0, 1.0, 3.0, "x", "disagrees"),
        ("+", 2.0, -0.1, 4.0, "x", "undecided"),
        ("+", 2.0, 0.0, 4.0, "x", "undecided"),
        ("", 2.0, 1.0, 3.0, "x", "undecided"),
        ("+", float("nan"), float("nan"), float("nan"), "x", "not testable here"),
        ("+", float("nan"), float("nan"), float("nan"), None, "not run"),
    ],
)
def test_verdicts(expected, value, low, high, on, verdict):
    assert paper.verdict(expected, value, low, high, on) == verdict


def test_the_scoreboard_reads_what_notebooks_wrote(monkeypatch, tmp_path):
    monkeypatch.setenv("FUNGI_FIGURES", str(tmp_path))
    assert set(paper.scoreboard("mini")["verdict"]) == {"not run"}
    measured = pd.DataFrame([("table2-k", 1.0, 0.5, 1.5, "digits; b")], columns=paper.MEASURED)
    paper.save_measured(measured, "03_image_classification", "mini")
    board = paper.scoreboard("mini").set_index("id")
    assert (
        board.loc["table2-k", "verdict"] == "agrees" and (board["verdict"] != "not run").sum() == 1
    )
    with pytest.raises(ValueError, match="02_complementarity has no claim 'table2-k'"):
        paper.save_measured(measured, "02_complementarity", "mini")


def test_contrast_is_the_paired_difference_of_mean_accuracies():
    good, noise = (rows(200, 0), rows(120, 1)), (rows(200, 0, "dino"), rows(120, 1, "dino"))
    found = protocol.contrast([("K", *good), ("E", *good)], [("K", *noise)])
    alone = {
        x: protocol.over_seeds([pair], [x])["value"][0] for x, pair in (("K", good), ("E", good))
    }
    expected = (alone["K"] + alone["E"]) / 2 - protocol.over_seeds([noise], ["K"])["value"][0]
    assert found.mean == pytest.approx(expected) and found.low < found.mean < found.high
    same = protocol.contrast([("K", *good)], [("K", *good)])
    assert tuple(same) == (0, 0, 0)


def test_projections_of_factors_approach_the_exact_similarity():
    from fungi_core.gradients import Factors

    g = torch.Generator().manual_seed(0)
    splits = []
    for n, seed in ((120, 0), (60, 1)):
        plain = rows(n, seed)
        a, d = torch.randn(n, 1, 8, generator=g), torch.randn(n, 1, 12, generator=g) * 0.3
        d[torch.arange(n), 0, torch.from_numpy(plain.labels)] += (
            2  # the output gradient knows the class
        )
        splits.append(extract.Features(plain.data, plain.blocks | {"kl": Factors(a, d, True)}, ()))
    table = studies.projections(*splits, "K", draws=3, multiples=(1, 16), k=5, seed=0).set_index(
        ["kind", "size"]
    )
    assert len(table) == 1 + 3 * 2
    exact = table.loc[("exact", "")]
    similar = protocol.similarity(splits[1], splits[0], "K")
    assert exact["value"] == pytest.approx(
        100 * np.mean(evaluate.knn_by_similarity(similar, splits[0].labels, 5) == splits[1].labels)
    )
    for kind in studies.PROJECTIONS:
        small, large = table.loc[(kind, "d")], table.loc[(kind, "16 d")]
        assert large["distortion"] < 0.5 * small["distortion"] and small["seconds"] > 0
        assert small["gain"] == pytest.approx(small["value"] - exact["value"])
        assert small["gain_low"] <= small["gain"] <= small["gain_high"]
    assert table.loc[("dense ±1", "16 d"), "distortion"] < 8  # 1 / sqrt(2 * 192) and a little


def test_few_shots_are_drawn_anew_and_shared_by_all_features():
    pairs = [(rows(60, seed), rows(40, 9)) for seed in (0, 1)]
    found = studies.shot_hits(pairs, ["E", "E+K"], [1, 3], 4, k=1, seed=0)
    assert {key: right.shape for key, right in found.items()} == dict.fromkeys(
        [("E", 1), ("E", 3), ("E+K", 1), ("E+K", 3)], (4, 40)
    )
    draws = found["E+K", 1]
    assert len({row.tobytes() for row in draws}) == 4  # other images, other seeds in turn
    for d in range(4):
        train, test = pairs[d % 2]
        few = evaluate.few_shot_indices(train.labels, 3, generator("shots", 0, d))
        a, b = protocol.fungi_features(train.take(few), test, "E+K", 12)
        model = KNeighborsClassifier(1).fit(a, train.labels[few])
        assert (found["E+K", 3][d] == (model.predict(b) == test.labels)).all()


def test_the_curve_of_pca_sizes_is_the_accuracy_at_each():
    pairs = [(rows(80, 0), rows(40, 9))]
    curve = studies.pca_curve(pairs, ["E+K"], [4, 8], k=5, seed=0)
    assert curve["features"].tolist() == ["E+K"] * 3
    for size, value, gain in curve[["size", "value", "gain"]].to_numpy():
        a, b = protocol.fungi_features(*pairs[0], "E+K", None if np.isnan(size) else int(size))
        model = KNeighborsClassifier(5).fit(a, pairs[0][0].labels)
        assert value == pytest.approx(100 * model.score(b, pairs[0][1].labels))
        assert gain == pytest.approx(value - curve["value"][0])


def test_folds_are_pooled_by_clip():
    """Unequal folds: every test row counts once, and a fold alone is one seed."""
    folds = [(rows(40, 2 * i), rows(20 + 8 * i, 2 * i + 1)) for i in range(3)]
    letters = ("E", "E+S", "E+K", "E+K+S")
    table = protocol.over_folds(folds, letters, k=5).set_index("features")
    for name in letters:
        hits = [protocol.right_or_wrong(*fold, name, 5, None) for fold in folds]
        assert table.loc[name, "value"] == pytest.approx(100 * np.concatenate(hits).mean())
    assert table.loc["E+K+S", "step"] == pytest.approx(
        table.loc["E+K+S", "value"] - table.loc["E+K", "value"]
    )
    for shots in (None, 2):
        alone = protocol.over_folds(folds[:1], letters, k=5, shots=shots, pca=6)
        pd.testing.assert_frame_equal(
            alone, protocol.over_seeds([folds[0]], letters, k=5, shots=shots, pca=6)
        )
    gains = protocol.class_gains(folds, ["E+K"], k=5)
    labels = np.concatenate([test.labels for _, test in folds])
    right = {
        n: np.concatenate([protocol.right_or_wrong(*f, n, 5, None) for f in folds])
        for n in ("E", "E+K")
    }
    by_hand = [
        100 * (right["E+K"][labels == c].mean() - right["E"][labels == c].mean()) for c in range(4)
    ]
    np.testing.assert_allclose(gains["value"], by_hand)


def test_folds_are_found_by_name():
    runs = [
        ("net", name, name, name)
        for name in ("esc10_fold1", "esc10_fold2", "fsdd", "esc50_fold4_part1")
    ]
    gathered = studies.by_set(runs)
    assert list(gathered) == [("net", "esc10"), ("net", "fsdd"), ("net", "esc50_fold4")]
    assert gathered["net", "esc10"] == [("esc10_fold1",) * 2, ("esc10_fold2",) * 2]


def test_changed_images_are_those_that_scikit_learns_votes_put_on_the_other_side():
    def drawn(n, seed):
        out = rows(n, seed)
        pixels = [np.full((4, 4, 3), i % 256, np.uint8) for i in range(n)]
        return extract.Features(replace(out.data, items=pixels), out.blocks, ())

    train, test = drawn(200, 0), drawn(120, 1)
    right = {}
    for letters, name in (("E", "embedding"), ("K", "kl")):
        model = KNeighborsClassifier(7).fit(normalize(train.blocks[name]), train.labels)
        right[letters] = model.predict(normalize(test.blocks[name])) == test.labels
    own = test.labels == 2
    won, lost = (own & right["K"] & ~right["E"]).sum(), (own & right["E"] & ~right["K"]).sum()
    found = studies.changed(train, test, "K", 2, k=7, most=99)
    assert [row["better"] for row in found] == [True] * won + [False] * lost and won > 5
    gain = [row["votes"]["K"] - row["votes"]["E"] for row in found if row["better"]]
    assert gain == sorted(gain, reverse=True) and min(gain) > 0
    assert all(len(side) == 5 for row in found for side in row["found"].values())
    assert len(studies.changed(train, test, "K", 2, k=7, most=2)) <= 4


def test_the_gain_of_more_pretraining_by_hand():
    """Two data sets, gains 3 and 1 against 1 and 1; half-widths 3 and 4 make 5."""
    more, less = next(iter(studies.MORE_DATA.items()))
    rows = [
        (more, "a", 3, 0, 6),
        (less, "a", 1, -3, 5),
        (more, "b", 1, -2, 4),
        (less, "b", 1, -3, 5),
    ]
    frame = pd.DataFrame(rows, columns=["backbone", "dataset", "gain", "gain_low", "gain_high"])
    found = studies.gain_by_data(frame)
    np.testing.assert_allclose(found, evaluate.random_effects([2, 0], [-3, -5], [7, 5])[:3])
    assert found[0] == pytest.approx(1)
    assert np.isnan(studies.gain_by_data(frame[frame["backbone"] == more])).all()

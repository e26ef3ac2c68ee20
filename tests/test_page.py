"""A page: what a notebook reads, saves and claims, with a provenance that nobody types."""

import json
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from companion import paper, protocol, run
from companion.figures import style
from companion.page import Page, where

SLUG = "15_pca"  # a made-up notebook under a name that has a claim
PARAMETERS = """\
profile: str = "mini"  # which figures folder this run writes to
backbones: list = ["a"]  # encoders
datasets: list = ["x", "y"]  # data sets
n_train: int = 5  # training images
n_test: int = 4  # test images
k: int = 20  # neighbours
seed: int = 3  # draws everything"""


@pytest.fixture
def names(tmp_path, monkeypatch) -> dict:
    """The variables of a made-up notebook that lies in a folder of its own."""
    cell = new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    nbformat.write(new_notebook(cells=[cell]), tmp_path / f"{SLUG}.ipynb")
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "mini.yaml").write_text("profile: mini")
    monkeypatch.setattr(run, "NOTEBOOKS", tmp_path)
    monkeypatch.setenv("FUNGI_FIGURES", str(tmp_path / "figures"))
    exec(PARAMETERS, space := {})
    return space | {"unrelated": 1, "k": 7}  # as papermill or a reader has set it


class Data(SimpleNamespace):
    def __len__(self):
        return 9


def rows(dataset: str, split: str, *keys: str):
    data = Data(name=dataset, split=split, fingerprint=dataset + split, note="")
    return SimpleNamespace(data=data, keys=keys)


def made(backbone: str, dataset: str):
    return backbone, dataset, rows(dataset, "train", "e", "k"), rows(dataset, "test", "e", "t")


@pytest.fixture
def asked(monkeypatch) -> list:
    """What `protocol.collect` is asked for, in place of extracting it."""
    calls = []

    def collect(backbones, datasets, objectives, **options):
        calls.append((backbones, datasets, list(objectives), options))
        return [made(backbone, dataset) for backbone in backbones for dataset in datasets]

    monkeypatch.setattr(protocol, "collect", collect)
    return calls


def saved(tmp_path, name: str) -> dict:
    return json.loads((tmp_path / "figures" / "own" / f"{name}.json").read_text())


def test_opening_says_what_will_be_run(names, capsys):
    Page(SLUG, names)
    assert capsys.readouterr().out == (
        "profile mini: backbones ['a'], datasets ['x', 'y'], n_train 5, n_test 4, k 7, seed 3\n"
    )


def test_a_parameter_without_a_value_is_one_line(names):
    del names["n_test"]
    with pytest.raises(ValueError, match="15_pca: no value of the parameter 'n_test'"):
        Page(SLUG, names)
    with pytest.raises(ValueError, match="unknown notebook '99_none'; there are 15_pca"):
        Page("99_none", names)


def test_runs_take_the_parameters_unless_given(names, asked):
    page = Page(SLUG, names)
    assert [found[:2] for found in page.runs()] == [("a", "x"), ("a", "y")]
    page.runs(["kl"], seed=4, layer="blocks.1")
    sizes = {"n_train": 5, "n_test": 4}
    assert asked == [
        (["a"], ["x", "y"], ["kl", "dino", "simclr"], sizes | {"seed": 3}),
        (["a"], ["x", "y"], ["kl"], sizes | {"seed": 4, "layer": "blocks.1"}),
    ]


def test_a_check_is_made_with_the_declared_parameters_alone(names, capsys):
    page = Page(SLUG, names | {"k": 20})
    page.check("table16-pca", 1.0, 1.0, within=0.1)
    *_, said = capsys.readouterr().out.splitlines()
    assert said.startswith("Table 16: PCA does not cost accuracy")  # in words, not by its id
    for value in (1.0, 2.0):
        page.check("gain", value, 1.1, within=0.2)
    Page(SLUG, names).check("gain", 1.0, 1.1, within=0.2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("gain")]
    assert lines == [
        "gain. Measured within 0.2 of the stored 1.1: True",
        "gain. Measured within 0.2 of the stored 1.1: False",
        "gain: other parameters than the stored number's",
    ]


def test_the_provenance_holds_every_declared_parameter_and_all_that_was_read(
    names, asked, tmp_path
):
    page, numbers = Page(SLUG, names), pd.DataFrame({"value": [1.0]})
    page.use([made("a", "x")])
    page.use([made("b", "x")])
    fig, _ = style.figure(width=2, height=2)
    assert page.figure(fig, "table16_pca", numbers) is fig
    shown = page.table(numbers, "table16_numbers", decimals=2)
    assert "1.00" in shown.to_html()
    for name in ("table16_pca", "table16_numbers"):
        record = saved(tmp_path, name)
        assert record["notebook"] == SLUG and record["seed"] == 3
        assert record["parameters"] == {name: names[name] for name in run.declared(SLUG)}
        assert record["parameters"]["k"] == 7
        assert record["stores"] == ["e", "k", "t"]  # each once, in the order of reading
        read = [(data["name"], data["split"]) for data in record["datasets"]]
        assert read == [("x", "train"), ("x", "test")]
        assert record["wall_seconds"] >= 0
    short = page.provenance()
    assert list(short) == ["notebook", "seed", "commit", "versions"] and short["notebook"] == SLUG


def test_claims_go_to_the_scoreboard_and_are_shown_in_words(names, asked):
    page = Page(SLUG, names)
    runs = page.runs()
    html = page.claims({"table16-pca": (-0.54, -0.9, -0.1)}).to_html()
    row = paper.scoreboard("own").set_index("id").loc["table16-pca"]
    assert (row["value"], row["on"], row["verdict"]) == (-0.54, "x, y; a", "disagrees")
    for part in (row["claim"], "+0.3", "−0.5", "[−0.9, −0.1]", "disagrees"):
        assert part in html, part
    page.claims({"table16-pca": (1.0, 0.5, 1.5)}, runs[1:])
    assert paper.scoreboard("own").set_index("id").loc["table16-pca", "on"] == "y; a"
    page.claims({"table16-pca": (*3 * [float("nan")], "needs another backbone")})
    row = paper.scoreboard("own").set_index("id").loc["table16-pca"]
    assert (row["on"], row["verdict"]) == ("needs another backbone", "not testable here")
    with pytest.raises(ValueError, match="15_pca has no claim 'table2-k'"):
        page.claims({"table2-k": (1.0, 0.5, 1.5)})


def test_lists_that_papermill_gives_as_text_are_read_and_wrong_values_named(names):
    given = names | {"datasets": '["z", 2024]', "k": 9}
    page = Page(SLUG, given)
    assert page.parameters["datasets"] == given["datasets"] == ["z", "2024"]  # later cells, too
    with pytest.raises(ValueError, match="15_pca: parameter 'k' takes int, not float 1.5"):
        Page(SLUG, names | {"k": 1.5})


def test_the_commit_is_that_of_the_code_that_runs(names, monkeypatch):
    monkeypatch.setattr("companion.page.git", lambda: {"commit": "a", "dirty": False})
    page = Page(SLUG, names)
    monkeypatch.setattr("companion.page.git", lambda: {"commit": "b", "dirty": True})  # a pull
    assert (page.proof()["commit"], page.proof()["dirty"]) == ("a", False)


def test_results_of_other_parameters_are_not_the_profiles(names, tmp_path):
    page = Page(SLUG, names | {"k": 20})
    assert page.folder() == tmp_path / "figures" / "mini"
    page.parameters["k"] = 7  # chosen in a panel
    assert page.folder() == Page(SLUG, names).folder() == tmp_path / "figures" / "own"


def test_on_names_data_sets_and_backbones_once():
    assert where([("a", "x"), ("b", "x"), ("a", "y")]) == "x, y; a, b"

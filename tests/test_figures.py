import json
import os
import re
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from matplotlib.colors import to_rgb

from companion import paths
from companion.figures import grids, panels, plots, verdicts
from companion.figures import style as figures
from companion.provenance import provenance

LETTERS = ["E", "K", "D", "S"]
ROOT = Path(__file__).resolve().parents[1]


def small_figure():
    fig, [[ax]] = figures.figure(width=figures.COLUMN, height=1.5)
    ax.plot([0, 1], [0.1, 0.3], color=figures.colour("K"))
    ax.set(xlabel="shots", ylabel="accuracy (%)")
    return fig


@pytest.fixture
def record():
    return provenance("02_complementarity", {"profile": "mini", "k": 20, "seed": 0})


def labels(fig) -> set[str]:
    return {t.get_text() for t in fig.findobj(lambda a: hasattr(a, "get_text"))}


def filled(ax) -> list:
    """Our marks: filled dots with a number under them."""
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    return [line for line in dots if np.isfinite(np.asarray(line.get_xydata(), float)).all()]


def opened(ax) -> list:
    """The paper's marks: open diamonds with a number under them."""
    diamonds = [line for line in ax.lines if line.get_marker() == "D"]
    return [line for line in diamonds if np.isfinite(np.asarray(line.get_xydata(), float)).all()]


def test_a_second_run_writes_the_same_bytes(tmp_path, record):
    numbers = pd.DataFrame({"features": ["E", "K"], "value": [1 / 3, np.nan]})
    runs = [
        figures.save_figure(small_figure(), "two_lines", numbers, record, tmp_path / str(i))
        for i in range(2)
    ]
    for suffix in ("png", "pdf", "csv"):
        assert runs[0][suffix].read_bytes() == runs[1][suffix].read_bytes(), suffix
    assert runs[0]["csv"].read_bytes() == b"features,value\nE,0.333333\nK,\n"
    assert (
        runs[0]["png"].read_bytes().startswith(b"\x89PNG")
        and b"Software" not in runs[0]["png"].read_bytes()
    )
    assert (
        runs[0]["pdf"].read_bytes().startswith(b"%PDF")
        and b"CreationDate" not in runs[0]["pdf"].read_bytes()
    )
    written = json.loads(runs[0]["json"].read_text())
    assert written == record | {
        "alt": "Plot of 1 panel. Vertical: accuracy (%). Horizontal: shots."
    }


def test_another_process_writes_the_same_bytes(tmp_path):
    """String hashes differ between processes: nothing drawn may hang on the order of a set."""
    code = (
        "import sys, pathlib, pandas as pd; from companion.figures import plots, style;"
        "t = pd.DataFrame({'features': ['E', 'E+K'], 'value': [40, 41.5], 'paper': [40, 1.5]});"
        "folder = pathlib.Path(sys.argv[1]);"
        "style.save_figure(plots.accuracy_by_features(t), 'plot', t, {}, folder);"
        "style.save_table(t, 'table', {}, folder);"
        "(folder / 'table.html').write_text(style.show_table(t).to_html())"
    )
    for seed in ("1", "2"):
        packages = os.pathsep.join([str(ROOT), str(ROOT / "notebooks")])
        env = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": packages}
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / seed)], env=env, check=True, cwd=tmp_path
        )
    for name in ("plot.png", "plot.pdf", "plot.csv", "table.csv", "table.html"):
        first, second = (tmp_path / seed / name for seed in ("1", "2"))
        assert first.read_bytes() == second.read_bytes(), name


def test_a_figure_is_four_files_and_leaves_nothing_else(tmp_path, record):
    numbers = pd.DataFrame({"value": [1.0]})
    written = figures.save_figure(small_figure(), "fig_2", numbers, record, tmp_path / "mini")
    names = {f"fig_2.{suffix}" for suffix in ("csv", "json", "pdf", "png")}
    assert {p.name for p in (tmp_path / "mini").iterdir()} == names
    assert set(written.values()) == set((tmp_path / "mini").iterdir())


def test_a_named_index_is_written_with_the_numbers(tmp_path):
    numbers = pd.DataFrame({"value": [1.0]}, index=pd.Index(["dtd"], name="dataset"))
    written = figures.save_figure(small_figure(), "x", numbers, {}, tmp_path)
    assert written["csv"].read_text() == "dataset,value\ndtd,1\n"


@pytest.mark.parametrize("name", ["", "Fig2", "a b", "../x", "fig-2", "x\n"])
def test_bad_names_are_refused_before_anything_is_written(tmp_path, name):
    with pytest.raises(ValueError, match="lower-case letters, digits and underscores"):
        figures.save_figure(small_figure(), name, pd.DataFrame({"value": [1.0]}), {}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failing_write_leaves_the_old_file_and_no_part(tmp_path, monkeypatch):
    old = figures.save_figure(small_figure(), "x", pd.DataFrame({"value": [1.0]}), {}, tmp_path)[
        "csv"
    ].read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figures.os, "replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        figures.save_figure(small_figure(), "x", pd.DataFrame({"value": [2.0]}), {}, tmp_path)
    assert (tmp_path / "x.csv").read_bytes() == old
    assert not list(tmp_path.glob(".*"))


def test_provenance_records_what_a_reader_needs_and_is_json():
    class Digits:
        name, split, fingerprint, note = "digits", "test", "ab12", "all rows"

        def __len__(self):
            return 797

    parameters = {"profile": "mini", "k": 20, "seed": 7}
    stores = ["k1", "k2"]
    found = provenance(
        "03", parameters, stores=stores, datasets=[Digits()], started=time.time() - 5
    )
    assert found == json.loads(json.dumps(found))
    assert found["parameters"] == parameters
    assert found["seed"] == 7 and found["stores"] == ["k1", "k2"]
    digits = {
        "name": "digits",
        "split": "test",
        "n": 797,
        "fingerprint": "ab12",
        "note": "all rows",
    }
    assert found["datasets"] == [digits]
    assert 5 <= found["wall_seconds"] < 60
    assert {"python", "torch", "timm", "numpy", "scikit-learn", "fungi_core"} <= set(
        found["versions"]
    )
    assert found["device"]["cores"] >= 1 and found["device"]["cpu"]


def test_git_state(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    nothing = {"commit": None, "dirty": None}

    def state():
        found = provenance("x", {"seed": 0})
        return {k: found[k] for k in nothing}

    assert state() == nothing  # no checkout
    subprocess.run(["git", "init", "-q"], cwd=tmp_path.parent, check=True)
    monkeypatch.delenv("GIT_CEILING_DIRECTORIES")
    assert state() == nothing  # nor is one around it ours
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")
        assert state() == nothing  # no git

    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "code.py").write_text("1")
    git("add", ".")
    git("commit", "-qm", "first")
    assert state() == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "x.csv").write_text("1")
    assert state()["dirty"] is False  # what a run writes does not make its own source dirty
    (tmp_path / "code.py").write_text("2")
    assert state()["dirty"] is True


def test_a_table_is_written_and_shown_without_a_picture(tmp_path, record):
    table = pd.DataFrame(
        {
            "gain_low": ["dtd", "cifar"],
            "ours": [50.96, 3.04],
            "paper": [np.nan, 4.8],
            "n": [400, 1000],
            "claim": ["a long claim " * 5, None],
            "verdict": ["agrees", "undecided"],
        }
    )
    figures.save_table(table, "table_1", record, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["table_1.csv", "table_1.json"]
    lines = (tmp_path / "table_1.csv").read_text().splitlines()
    assert lines[2] == "cifar,3.04,4.8,1000,,undecided"
    said = json.loads((tmp_path / "table_1.json").read_text())
    assert said == record | {"alt": "Table of 2 rows: gain_low, ours, paper, n, claim, verdict."}
    html = figures.show_table(table).to_html()
    soup = BeautifulSoup(html, "html.parser")
    assert [cell.text for cell in soup.select("thead th")][:2] == ["gain low", "ours"]
    cells = [[cell.text for cell in row.select("td")] for row in soup.select("tbody tr")]
    assert cells[0] == ["dtd", "51.0", "–", "400", "a long claim " * 5, "agrees"]
    assert cells[1] == ["cifar", "3.0", "4.8", "1000", "–", "undecided"]
    assert not soup.select("tbody th")  # no index
    assert repr(figures.show_table(table)) == said["alt"]  # no address: two runs look alike
    once = table[:1].pivot(columns="verdict", values=["ours", "n"])
    assert repr(figures.show_table(once)) == "Table of 1 row: ours agrees, n agrees."


def rules(table: pd.DataFrame) -> dict[str, str]:
    """{selector without the table's id: declarations} of a table as it is shown."""
    css = BeautifulSoup(figures.show_table(table).to_html(), "html.parser").style.text
    found = re.findall(r"([^{}]+)\{([^}]*)\}", css)
    names = []
    for selectors, what in found:
        for who in selectors.split(","):  # "#T_1234_row0_col2" or "#T_1234 td.col1"
            names.append((re.sub(r"#T_[0-9a-f]+(_row\d+_| )?", "", who.strip()), what))
    return {who: " ".join(what.split()) for who, what in names}


def test_words_stand_left_numbers_right_and_verdicts_have_their_colours():
    frame = pd.DataFrame({"claim": ["x" * 50], "value": [1.0], "verdict": ["undecided"]})
    found = rules(frame)
    assert "text-align: right" in found["td.col1"] and "text-align: right" in found["th.col1"]
    assert "text-align: left" in found["td.col0"] and "min-width" in found["td.col0"]
    assert "min-width" not in found["td.col2"]
    ink = figures.VERDICTS["undecided"]
    assert f"background-color: {ink}; color: black" in found["col2"]
    assert "#777777" in rules(pd.DataFrame({"paper gain": [1.0]}))["td.col0"]
    assert "background-color" not in str(rules(frame.rename(columns={"verdict": "other"})))


def test_names_of_data_sets_stay_whole_at_the_head_of_two_rows():
    keys = pd.MultiIndex.from_product([["vit_micro.sup"], ["cifar_10", "dtd_10"]])
    table = pd.DataFrame([[1.0, 2.0]], index=pd.Index(["E"], name="features"), columns=keys)
    soup = BeautifulSoup(figures.show_table(table).to_html(), "html.parser")
    heads = [[cell.text.strip() for cell in row.select("th")] for row in soup.select("thead tr")]
    assert heads == [["features", "vit_micro.sup"], ["", "cifar_10", "dtd_10"]]


def test_a_named_index_becomes_columns_and_two_tables_have_two_ids():
    table = pd.DataFrame({"value": [1.25]}, index=pd.Index(["dtd"], name="dataset"))
    html = figures.show_table(table, 2).to_html()
    assert "dtd" in html and "1.25" in html
    ids = {
        re.search(r'id="(T_\w+?)"', figures.show_table(t).to_html())[1] for t in (table, 2 * table)
    }
    assert len(ids) == 2


def test_colours_are_fixed_and_far_apart():
    def lab(ink):
        from skimage.color import rgb2lab

        return rgb2lab([[to_rgb(ink)]])[0, 0]

    inks = list(figures.COLOURS.values())
    for i, a in enumerate(inks):
        for b in inks[:i]:
            assert np.linalg.norm(lab(a) - lab(b)) > 20, (a, b)
    assert figures.colour("E+S") == figures.COLOURS["E+K"]
    with pytest.raises(ValueError, match="unknown feature letter 'X'; there are E, K, D, S"):
        figures.colour("E+X")
    assert figures.contrast("#FFFFFF") == "black" and figures.contrast("#0072B2") == "white"


def test_figures_are_forgotten_by_pyplot_and_have_two_widths():
    before = figures.plt.get_fignums()
    fig = small_figure()
    assert figures.plt.get_fignums() == before
    assert fig.get_figwidth() == pytest.approx(85 / 25.4)
    assert figures.figure()[0].get_figwidth() == pytest.approx(160 / 25.4)


def test_letters_names_and_colours_are_one_table():
    assert figures.LETTERS["mlm"] == "M" and figures.NAMES["M"] == "masked words"
    assert list(figures.LETTERS.values()) == list(figures.NAMES) == list(figures.COLOURS)[:7]


def test_at_most_twelve_panels_are_drawn_and_the_rest_is_counted():
    rows = [(f"set{i}", k, "a", 1.0) for i in range(5) for k in "KDS"]
    gains = pd.DataFrame(rows, columns=["dataset", "features", "class", "value"])
    fig = plots.class_deltas(gains)
    assert len(fig.axes) == 12
    assert "not drawn: 1 more, with their numbers in the CSV" in labels(fig)
    assert not any("not drawn" in text for text in labels(plots.class_deltas(gains[:12])))
    fig, parts = panels.facets(
        pd.DataFrame({"dataset": [f"p{i}" for i in range(14)]}), ["dataset"], 1
    )
    assert len(fig.axes) == len(parts) == 12
    assert "not drawn: 2 more, with their numbers in the CSV" in labels(fig)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dtd_10", "DTD Textures"),
        ("camvid", "CamVid, 11 classes"),
        ("tiny_imagenet_100a mosaics", "Tiny ImageNet (100 of 200\nclasses) mosaics"),
        ("my_photographs", "my_photographs"),
        ("deit_tiny_patch16_224.fb_in1k", "DeiT ViT-Ti/16"),
        ("vit_tiny_patch16_224.not_in_the_table", "vit_tiny_patch16_224.\nnot_in_the_table"),
    ],
)
def test_panels_are_titled_in_the_words_of_the_tables(name, words):
    frame = pd.DataFrame({"dataset": [name], "setting": ["full"]})
    titles = panels.titles_of(frame, ("dataset", "backbone", "setting"), "\n")
    assert titles[0] == f"{words}\nall labels"


def test_what_all_panels_share_stands_above_them_once():
    sets = pd.DataFrame({"dataset": ["dtd", "cifar10"], "backbone": "vit_mini", "setting": "full"})
    by = ("dataset", "backbone", "setting")
    fig, parts = panels.facets(sets, by, 1)
    titles = [ax.get_title("left") for [ax], _ in parts]
    assert titles == ["DTD Textures", "CIFAR 10"] and fig.get_suptitle() == "vit_mini · all labels"
    panels.key(fig, {"ours": {}})  # it takes the words over, which it would lie on
    assert fig.get_suptitle() == ""
    assert fig.legends[0].get_title().get_text() == "vit_mini · all labels"
    fig, parts = panels.facets(sets[:1], by, 1)
    assert parts[0][0][0].get_title("left") == "DTD Textures · vit_mini · all labels"
    assert not fig.get_suptitle()


def test_parts_that_have_one_title_keep_their_names():
    names = pd.Series(["dtd", "dtd_10", "cifar10"])
    assert panels.in_words(names).tolist() == names.tolist()
    assert panels.in_words(names[1:]).tolist() == ["DTD Textures", "CIFAR 10"]


def test_words_may_follow_a_name_and_full_is_a_setting_alone():
    names = pd.Series(["cifar10 mosaics", "full", "shared head, full"])
    assert panels.in_words(names).tolist() == ["CIFAR 10 mosaics", "all labels", names[2]]


def test_folds_together_are_called_as_one_of_them():
    names = pd.Series(["esc10", "esc10_fold2", "esc50"])
    assert panels.in_words(names).tolist() == ["ESC-10", "ESC-10, fold 2", "ESC 50"]


def test_variants():
    rows = [("neither", np.nan, np.nan), ("head", 66.4, -2.0), ("both", 68.4, 0.0)]
    df = pd.DataFrame(rows, columns=["variant", "value", "gain"])
    df = df.assign(
        gain_low=df["gain"] - 1, gain_high=df["gain"] + 1, column="SimCLR gradient", features="S"
    )
    df = pd.concat([df.assign(dataset=name) for name in ("dtd", "cifar10")])
    df["paper"] = [np.nan, -1.0, np.nan] * 2
    fig = plots.variants(df, against="the default")
    first, second = fig.axes
    assert [line.get_xydata()[0].tolist() for line in filled(first)] == [[-2, 1], [0, 2]]
    assert [line.get_xdata()[0] for line in opened(first)] == [-1] and len(filled(second)) == 2
    assert {
        "not applicable",
        "66.4",
        "neither",
        "SimCLR gradient",
        "CIFAR 10",
        "the paper's difference",
    } <= labels(fig)
    assert [t.get_text() for t in first.get_yticklabels()] == ["neither", "head", "both"]
    with pytest.raises(AttributeError, match="'gain_high'"):
        plots.variants(df.drop(columns="gain_high"), against="x")
    further = df[df["dataset"] == "dtd"].assign(column="full")
    fig = plots.variants(pd.concat([df, further]), against="the default")
    assert "all labels" in labels(fig)
    networks = df.replace({"variant": {"head": "deit_tiny_patch16_224.fb_in1k"}})
    ticks = plots.variants(networks, against="the default").axes[0].get_yticklabels()
    assert [t.get_text() for t in ticks] == ["neither", "DeiT ViT-Ti/16", "both"]
    assert [any(t.get_text() == "not run" for t in ax.texts) for ax in fig.axes] == [0, 0, 0, 1]


def pairs(*rows) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["a", "b", "value"])


def test_cka_heatmaps():
    rows = [("E", "E", 1), ("E", "K", 0.25), ("E", "D", 0.5)]
    df = pairs(*rows, ("K", "K", 1), ("K", "D", 0.75), ("D", "D", 1.0))
    df = df.rename(columns={"value": "cka"})
    fig = grids.cka_heatmaps(pd.concat([df.assign(dataset=name) for name in ("dtd", "cifar10")]))
    assert len(fig.axes) == 3  # two panels, one colour bar
    numbers = ["1.00", "0.25", "1.00", "0.50", "0.75", "1.00"]
    assert [t.get_text() for t in fig.axes[0].texts] == numbers
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ["E", "K", "D"]
    with pytest.raises(ValueError, match="no panels"):
        grids.cka_heatmaps(df[:0])


def test_pair_matrix_shades_by_the_difference_from_the_embedding():
    df = pairs(("E", "E", 50.0), ("E", "K", 52.0), ("K", "K", 45.0)).assign(dataset="dtd", all=53.5)
    fig = grids.pair_matrix(df)
    mesh = fig.axes[0].collections[0]
    assert np.allclose(np.ma.filled(mesh.get_array(), 99), [[0, 3.5], [2, -5]])
    assert mesh.norm.vmin == -5 and mesh.norm.vmax == 5
    assert {"50.0", "53.5", "52.0", "45.0", "all"} == {t.get_text() for t in fig.axes[0].texts}


def test_class_deltas_sorts_and_counts():
    rows = [
        ("dtd", k, c, v) for k in "KD" for c, v in zip("abcd", [1.0, -2.0, 0.0, 5.0], strict=True)
    ]
    fig = plots.class_deltas(pd.DataFrame(rows, columns=["dataset", "features", "class", "value"]))
    assert len(fig.axes) == 2
    assert [bar.get_height() for bar in fig.axes[0].patches] == [5, 1, 0, -2]
    assert "2 better\n1 worse" in labels(fig)
    with pytest.raises(KeyError, match="value"):
        plots.class_deltas(pd.DataFrame({"features": ["K"]}))


def accuracies(**columns):
    base = {
        "features": ["E", "E+K", "E+K+D+S"],
        "value": [40.0, 41.0, np.nan],
        "low": [39.0, 40.0, np.nan],
        "high": [41.0, 42.0, np.nan],
        "paper": [np.nan, 0.5, 3.0],
    }
    return pd.DataFrame(base).assign(**columns)


def test_accuracy_by_features_places_the_papers_gain_on_our_embedding():
    cells = [(d, s) for d in ("dtd", "cifar10") for s in ("full", "5-shot")]
    frame = pd.concat([accuracies(dataset=d, backbone="vit_mini", setting=s) for d, s in cells])
    fig = plots.accuracy_by_features(frame)
    assert len(fig.axes) == 4
    for ax in fig.axes:
        assert [line.get_ydata()[0] for line in filled(ax)] == [
            40,
            41,
        ]  # the third was not run: no mark
        assert [line.get_ydata()[0] for line in opened(ax)] == [40.5, 43]
    assert [ax.get_title("left").replace("\n", ", ") for ax in fig.axes] == [
        "DTD Textures, all labels",
        "CIFAR 10, all labels",
        "DTD Textures, 5-shot",
        "CIFAR 10, 5-shot",
    ]
    key = {"vit_mini", "our embedding + the paper's gain"}
    assert {"E", "+ K", "+ D+S"} | key <= labels(fig)


def test_a_published_backbone_has_its_difference_and_no_mark_of_ours():
    ours = {"variant": "vit_mini", "value": 41.0, "gain": 1.0, "gain_low": 0.5, "gain_high": 1.5}
    paper = {"variant": "DINO ViT-B/16", "value": 70.9, "paper": 1.9}
    df = pd.DataFrame([ours, paper]).assign(features="E+K+D+S", column="full")
    [ax] = plots.variants(df, against="the embedding").axes
    assert [line.get_xydata()[0].tolist() for line in filled(ax)] == [[1, 0]]
    assert [line.get_xydata()[0].tolist() for line in opened(ax)] == [[1.9, 1]]  # in its own row
    assert {"41.0", "70.9"} <= {t.get_text() for t in ax.texts}


def test_throughput_shows_the_fraction_of_the_floor():
    ours = {"features": ["K", "D"], "value": [400.0, 30.0], "floor": [500.0, 40.0]}
    frame = pd.DataFrame(ours | {"paper": [479, 32.0], "paper_floor": [479, 479 / 12]})
    speed, share = plots.throughput(frame).axes
    assert speed.get_xscale() == "log" and share.patches[0].get_width() == 0.8
    assert {t.get_text() for t in share.texts} == {"0.80", "0.75"}
    assert [round(line.get_xdata()[0], 3) for line in opened(share)] == [1, 0.802]


def test_scoreboard_groups_rows_by_verdict_the_disagreements_first():
    frame = pd.DataFrame(
        {
            "item": ["Table 1", "Table 1", "Fig. 3"],
            "claim": ["a", "b", "c"],
            "paper": [4.4, 2.8, 7.0],
            "value": [1.0, -1.0, np.nan],
            "low": [0.5, -1.5, np.nan],
            "high": [1.5, -0.5, np.nan],
            "verdict": ["agrees", "disagrees", "not run"],
        }
    )
    fig = verdicts.scoreboard(frame.assign(expected=["+", "-", ""]))
    [ax] = fig.axes
    assert [line.get_color() for line in filled(ax)] == [
        figures.VERDICTS["disagrees"],
        figures.VERDICTS["agrees"],
    ]
    assert len(opened(ax)) == 3
    names = ["disagrees (1)", "Table 1: b", "agrees (1)", "Table 1: a", "not run (1)", "Fig. 3: c"]
    assert [t.get_text() for t in ax.get_yticklabels()] == names
    assert [t.get_weight() for t in ax.get_yticklabels()] == ["bold", "normal"] * 3
    sides = [band.get_paths()[0].get_extents().intervalx.tolist() for band in ax.collections]
    assert (
        sides[0][1] == 0 and sides[1][0] == 0 and len(sides) == 2
    )  # the predicted side; none where none is
    with pytest.raises(ValueError, match="'maybe' is not in list"):
        verdicts.scoreboard(frame.assign(verdict="maybe"))


def test_long_claims_do_not_run_into_each_other():
    claims = ["word " * 30, "word " * 45, "word", "word " * 31]
    frame = pd.DataFrame({"claim": claims, "item": "Fig. 3", "verdict": "undecided"})
    fig = verdicts.scoreboard(frame.assign(paper=1.0, value=2.0, low=1.0, high=3.0, expected="+"))
    fig.canvas.draw()
    labels = fig.axes[0].get_yticklabels()
    said = [" ".join(label.get_text().split()) for label in labels]
    assert said == ["undecided (4)", *(f"Fig. 3: {claim}".strip() for claim in claims)]
    boxes = [label.get_window_extent() for label in labels]
    assert all(upper.y0 > lower.y1 for upper, lower in pairwise(boxes))


def deuteranopia(colours) -> np.ndarray:
    """sRGB colours (N, 3) as those without the middle cones see them (Machado, Oliveira and
    Fernandes 2009).
    """
    rgb = np.array([to_rgb(c) for c in colours])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    matrix = [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ]
    seen = np.clip(linear @ np.transpose(matrix), 0, 1)
    return np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)


TOGETHER = {
    "gradients": [figures.COLOURS[k] for k in "EKDSCI"],
    "verdicts": list(figures.VERDICTS.values()),
    "steps": [figures.COLOURS[k] for k in ("E", "E+K", "E+K+D", "E+K+D+S")],
    "layers": ["#0072B2", "#D55E00", "#009E73", "#CC79A7"],
}


@pytest.mark.parametrize("together", TOGETHER.values(), ids=TOGETHER.keys())
def test_colours_drawn_together_are_told_apart_without_red_and_green(together):
    """CIEDE2000 of every pair, simulated; a red and a green of one lightness fall to about 7."""
    from skimage.color import deltaE_ciede2000, rgb2lab

    def nearest(colours) -> float:
        lab = rgb2lab(deuteranopia(colours))
        return min(deltaE_ciede2000(a, b) for i, a in enumerate(lab) for b in lab[:i])

    assert nearest(together) > 15
    assert nearest(["#D62728", "#6B8E23"]) < 15  # the check can fail


def test_what_a_figure_shows_in_words():
    assert (
        figures.describe(small_figure())
        == "Plot of 1 panel. Vertical: accuracy (%). Horizontal: shots."
    )
    fig = plots.accuracy_by_features(accuracies(dataset="dtd"))
    said = figures.describe(fig)
    assert "Titles: DTD Textures." in said and "Key: ours, 95 % interval; our embedding" in said


def test_image_grid_frames_right_and_wrong():
    images = [np.zeros((4, 4, 3), np.uint8)] * 4 + [np.zeros((4, 4), np.uint8)]
    fig = grids.image_grid(images, list("abcde"), [True, False, None, None, None], ncols=3)
    assert sum(len(ax.images) for ax in fig.axes) == len(fig.axes) == 5
    edges = [ax.spines["top"].get_edgecolor()[:3] for ax in fig.axes[:2]]
    assert np.allclose(edges, [to_rgb(figures.VERDICTS[v]) for v in ("agrees", "disagrees")])
    assert not fig.axes[2].spines["top"].get_visible()
    with pytest.raises(ValueError, match="no images"):
        grids.image_grid([], [], ncols=3)


def test_every_plot_draws_without_a_warning(recwarn):
    """Rendering is where missing glyphs, clipped layouts and NaN limits show."""
    frame = accuracies(backbone="vit_mini", setting="full")
    for fig in (
        plots.accuracy_by_features(frame),
        plots.class_deltas(frame.assign(features="K")),
    ):
        fig.canvas.draw()
    assert not [str(w.message) for w in recwarn]


def frame(ax):
    """The verdict that an image's frame has the colour of, None without a frame."""
    left = ax.spines["left"]
    known = {to_rgb(ink): name for name, ink in figures.VERDICTS.items()}
    return known[to_rgb(left.get_edgecolor())] if left.get_visible() else None


def test_neighbours_are_whole_images_framed_by_class():
    tile = lambda right, title: {
        "image": np.zeros((4, 6, 3), np.uint8),
        "title": title,
        "right": right,
    }
    found = {
        "embedding": [tile(True, "a"), tile(False, "b")],
        "FUNGI": [tile(None, "c"), tile(True, "d")],
    }
    fig = grids.neighbours({"image": np.zeros((4, 6, 3), np.uint8), "title": "query"}, found)
    assert {"query", "a", "b", "c", "d", "embedding", "FUNGI"} <= labels(fig)
    framed = {ax.get_title(): frame(ax) for ax in fig.axes if ax.get_title() and ax.images}
    assert framed == {"query": None, "a": "agrees", "b": "disagrees", "c": None, "d": "agrees"}


def test_a_map_of_images_shows_a_thumbnail_where_there_is_room_and_a_dot_for_each():
    places = np.array([[0, 0], [0.001, 0], [10, 10], [10, 0]])
    images = [np.full((4, 4, 3), 60 * i, np.uint8) for i in range(4)]
    fig = grids.image_map(places, images, [0, 0, 1, 1], ["cat", "dog"])
    (ax,) = fig.axes
    assert len(ax.images) == 3 and len(ax.collections[0].get_offsets()) == 4
    assert {t.get_text() for t in fig.legends[0].get_texts()} == {"cat", "dog"}
    assert not grids.image_map(places, images).legends
    assert np.isfinite(
        grids.image_map(np.ones((3, 2)), images[:3]).axes[0].collections[0].get_offsets()
    ).all()  # all alike

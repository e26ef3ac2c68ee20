"""The stored numbers of the paper against what its pages print: counts, deltas, means, values typed
by hand.
"""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from test_run import written_files

from companion import paper, paths, protocol, run
from companion.figures import style
from companion.paths import PAPER, ROOT

# Numbers in the body of each printed table, counted on the page: rows x columns, "-" and "N/A" left
# out.
COUNTS = {
    1: 8 * 12,
    2: 8 * 7,
    3: 4 * 3 + 1,
    4: 5 * 4,
    5: 6 * 10,
    6: 4 + 4 + 3,
    7: 4 * 3 + 1,
    8: 8 * 6,
    9: 4 * 8,
    10: 8 * 10,
    11: 4 * 4,
    12: 2 + 6,
    13: 8 * 7,
    14: 8 * 6,
    15: 2 + 2,
    16: 4 + 4 * 2,
    19: 2 + 7,
    22: 4 * 3,
}
# Printed arrows. Table 5 prints none in its 20 embedding cells, nor for T5 Small, E+K, TREC full
# (no change).
DELTAS = {
    1: 4,
    2: 56,
    3: 13,
    4: 20,
    5: 60 - 20 - 1,
    6: 0,
    7: 13,
    8: 48,
    9: 0,
    10: 80,
    11: 16,
    12: 0,
    13: 56,
    14: 48,
    15: 0,
    16: 4,
    19: 0,
    22: 4,
}
KEY = ["row", "column", "setting", "metric"]
# The paper's own slips: (table, row, column, setting) -> value, embeddings value, printed delta.
DELTA_SLIPS = {(11, "E+S", "ESC 50", "full"): (45.2, 42.8, 2.5)}
# One backbone, one feature set, one protocol, two accuracies: feature set -> (Table 2, Table 22).
TABLE_22_SLIPS = {"Embeddings": (65.3, 67.3), "E+K": (66.3, 68.2)}
MEAN_SLIPS: dict[tuple, tuple] = {}  # Table 1 has none
DENSE = "kind == 'dense ±1' and size == 'd'"
NOTEBOOKS = {
    "00_start_here",
    "01_method",
    "02_complementarity",
    "03_image_classification",
    "04_data_efficiency",
    "05_scene_understanding",
    "06_text",
    "07_projection_head",
    "08_source_layer",
    "09_seeds",
    "10_retrieval",
    "11_audio",
    "12_linear_probe",
    "13_other_objectives",
    "14_dino_ablations",
    "15_pca",
    "16_simclr_views",
    "17_throughput",
    "18_discrepancies",
    "19_scoreboard",
    "20_your_own_data",
    "22_clustering",
    "23_controls",
    "25_sizes",
}


def key_of(frame: pd.DataFrame) -> list[str]:
    return KEY + [column for column in ["backbone"] if column in frame.columns]


def value(table: int, **where: str) -> float:
    frame = paper.load(table)
    for column, wanted in where.items():
        frame = frame[frame[column] == wanted]
    assert len(frame) == 1, (table, where, len(frame))
    return frame["value"].item()


def delta_slips(table: int) -> dict[tuple, tuple]:
    """Printed deltas that are not the difference to the baseline cell within the rounding of one
    decimal.
    """
    frame = paper.load(table)
    key = key_of(frame)
    cells = {tuple(cell[name] for name in key): cell for cell in frame.to_dict("records")}
    slips = {}
    for cell in cells.values():
        if math.isnan(cell["delta"]):
            continue
        # Table 16 compares with the column without PCA; fine-tuning in Table 4 is its own baseline.
        baseline = (
            {"column": "No PCA"}
            if table == 16
            else {}
            if cell["row"] == "E2E FT"
            else {"row": "Embeddings"}
        )
        reference = cells[tuple({**cell, **baseline}[name] for name in key)]["value"]
        if abs(cell["value"] - reference - cell["delta"]) > 0.051:
            slips[table, cell["row"], cell["column"], cell["setting"]] = (
                cell["value"],
                reference,
                cell["delta"],
            )
    return slips


def test_every_table_is_stored_and_its_note_is_of_one():
    assert {int(p.stem[5:]) for p in PAPER.glob("table*.csv")} == set(COUNTS)
    noted = re.findall(r"^- \*\*Table (\d+)\.", (PAPER / "NOTES.md").read_text(), re.MULTILINE)
    assert noted and {int(number) for number in noted} <= set(COUNTS)


COLUMNS = ["table", "row", "column", "setting", "metric", "value", "delta"]


@pytest.mark.parametrize("table", COUNTS)
def test_count_and_form(table):
    frame = paper.load(table)
    assert list(frame.columns[:7]) == COLUMNS
    assert set(frame.columns[7:]) <= {"backbone", "spread"}
    assert len(frame) == COUNTS[table]
    assert frame["delta"].notna().sum() == DELTAS[table]
    assert (frame["table"] == table).all()
    assert frame["value"].notna().all()
    assert not frame.duplicated(key_of(frame)).any()
    assert (frame[["row", "column", "metric"]] != "").all(axis=None)
    shares = frame[frame["metric"].isin(["accuracy", "mIoU", "mAP"])]["value"]
    assert shares.between(0, 100).all()


def test_printed_deltas_are_differences_but_for_the_known_slips():
    found = {key: numbers for table in COUNTS for key, numbers in delta_slips(table).items()}
    assert found == DELTA_SLIPS


def test_mean_column_of_table_1():
    frame = paper.load(1)
    slips = {}
    for group, cells in frame.groupby(["row", "setting", "backbone"]):
        printed = cells[cells["column"] == "Mean"]["value"].item()
        datasets = cells[cells["column"] != "Mean"]["value"]
        assert len(datasets) == 11
        if abs(datasets.mean() - printed) > 0.051:
            slips[group] = (round(datasets.mean(), 3), printed)
    assert slips == MEAN_SLIPS


def test_tables_that_print_the_same_quantity_agree():
    many = pd.concat([paper.load(2), paper.load(8)])
    many = {
        (cell["row"], cell["column"], cell["setting"]): cell["value"]
        for cell in many.to_dict("records")
    }
    means = paper.load(1).query("column == 'Mean'").to_dict("records")
    assert len(means) == 8
    for cell in means:
        row = {"FUNGI": "E+K+D+S"}.get(cell["row"], cell["row"])
        assert many[row, cell["backbone"], cell["setting"]] == cell["value"]
    with_pca = paper.load(16).query("column == 'PCA'").to_dict("records")
    assert len(with_pca) == 4
    for cell in with_pca:
        assert many[cell["row"], "DeiT ViT-B/16", "full"] == cell["value"]
    slips = {}
    for source, row in {"Embeddings": "Embeddings", "KL": "E+K"}.items():
        pair = many[row, "DeiT ViT-B/16", "full"], value(22, row=source, metric="accuracy")
        if pair[0] != pair[1]:
            slips[row] = pair
    assert slips == TABLE_22_SLIPS


@pytest.mark.parametrize(
    ("table", "expected", "where"),
    [
        (
            1,
            61.6,
            {
                "row": "FUNGI",
                "column": "Flowers",
                "setting": "full",
                "backbone": "AugReg IN1K ViT-B/16",
            },
        ),
        (
            1,
            51.0,
            {
                "row": "FUNGI",
                "column": "Pets",
                "setting": "5-shot",
                "backbone": "AugReg IN21K ViT-B/16",
            },
        ),
        (2, 70.1, {"row": "E+K+D+S", "column": "DeiT ViT-B/16", "setting": "full"}),
        (2, 33.5, {"row": "E+K", "column": "AugReg IN1K ViT-B/16", "setting": "5-shot"}),
        (3, 62.1, {"row": "FUNGI", "column": "DINO ViT-B/16", "setting": "1024x10^2"}),
        (3, 70.5, {"row": "Embeddings", "column": "HummingBird ViT-B/16‡", "setting": "1024x10^4"}),
        (4, 46.8, {"row": "FUNGI", "column": "ViT-B/16", "setting": "Pascal VOC 1/64 (n=165)"}),
        (
            5,
            18.4,
            {
                "row": "E+K+S",
                "column": "SST (Fine Grained)",
                "setting": "5-shot",
                "backbone": "BERT Base",
            },
        ),
        (
            5,
            40.6,
            {"row": "E+K", "column": "AG News", "setting": "10-shot", "backbone": "T5 Small"},
        ),
        (6, 90.1, {"row": "printed row 4 of 4 (default)", "column": "DINO"}),
        (7, 22.3, {"row": "FUNGI", "column": "DINO ViT-S/16", "setting": "1024x10^4"}),
        (8, 45.4, {"row": "E+K+D", "column": "MAE ViT-B/16", "setting": "full"}),
        (9, 28.3, {"row": "E+K+D+S", "column": "FGVC"}),
        (10, 52.8, {"row": "E+K", "column": "CLIP ViT-B/16", "setting": "Paris H"}),
        (10, 12.7, {"row": "E+D", "column": "DeiT ViT-B/16", "setting": "Oxford H"}),
        (11, 29.9, {"row": "E+K", "column": "SpeechCommands V2", "setting": "full"}),
        (12, 0.07, {"row": "Temperature", "column": "SimCLR"}),
        (13, 79.4, {"row": "E+K+D", "column": "MoCov3 ViT-B/32", "setting": "full"}),
        (14, 32.3, {"row": "E+K+D+S", "column": "MAE ViT-B/16", "setting": "5-shot"}),
        (15, 90.1, {"row": "Data Augmentation: Random Crops"}),
        (16, 67.8, {"row": "E+K+D", "column": "No PCA"}),
        (16, 384, {"row": "ViT-S/16", "metric": "dimensions"}),
        (19, 0.1, {"row": "Word Deletion p", "column": "SimCLR"}),
        (22, 344, {"row": "KL", "metric": "images/s"}),
    ],
)
def test_values_read_by_hand(table, expected, where):
    assert value(table, **where) == expected


def test_spread_of_table_9():
    frame = paper.load(9)
    assert frame[frame["row"] == "Embeddings"]["spread"].isna().all()
    assert frame["spread"].notna().sum() == 3 * 8
    assert frame["spread"].max() == 0.6


def test_claims():
    frame = paper.claims()
    columns = ["id", "item", "claim", "notebook", "paper_number", "paper_delta", "expected"]
    assert list(frame.columns) == columns
    assert frame["id"].is_unique
    assert set(frame["notebook"]) <= NOTEBOOKS
    assert set(frame["expected"]) <= {"+", "-", ""}
    assert (frame[["id", "item", "claim", "paper_number"]] != "").all(axis=None)
    figures, tabled = (2, 3, 5, 6, 8, 9, 10, 11, 12), (*range(1, 12), 13, 14, 15, 16, 22)
    ours = {"Clustering", "Controls"}
    items = {f"Fig. {n}" for n in figures} | {f"Table {n}" for n in tabled}
    assert set(frame["item"]) == items | ours
    numbers = frame[frame["paper_delta"].notna()]
    assert (numbers[numbers["expected"] == "+"]["paper_delta"] > 0).all()
    assert (numbers[numbers["expected"] == "-"]["paper_delta"] < 0).all()


@pytest.mark.parametrize(
    ("claim", "table", "where"),
    [
        ("table2-all", 2, {"row": "E+K+D+S", "column": "DeiT ViT-B/16", "setting": "full"}),
        ("table3-voc", 3, {"row": "FUNGI", "column": "DINO ViT-B/16", "setting": "1024x10^2"}),
        ("table10-dinov2", 10, {"row": "E+K+D", "column": "DINOv2 ViT-B/14", "setting": "Paris H"}),
        ("table11-kl", 11, {"row": "E+K", "column": "ESC 50", "setting": "full"}),
        ("table13-selfsup", 13, {"row": "E+K+D+S", "column": "DINO ViT-B/16", "setting": "5-shot"}),
        ("table16-pca", 16, {"row": "E+K+D+S", "column": "PCA"}),
    ],
)
def test_claims_quote_the_tables(claim, table, where):
    frame = paper.load(table)
    for column, wanted in where.items():
        frame = frame[frame[column] == wanted]
    claims = paper.claims().set_index("id")
    assert claims.loc[claim, "paper_delta"] == frame["delta"].item()


@pytest.mark.parametrize(("claim", "tables"), [("fig5-full", (2, 8)), ("fig9-linear", (13, 14))])
def test_derived_claims_are_the_mean_best_gain(claim, tables):
    gains = pd.concat([paper.load(table) for table in tables]).query(
        "row != 'Embeddings' and setting == 'full'"
    )
    best = gains.groupby("column")["delta"].max()
    assert len(best) == 13 and (best > 0).all()
    assert paper.claims().set_index("id").loc[claim, "paper_delta"] == round(best.mean(), 1)


def test_the_retrieval_claim_is_the_mean_over_all_backbones_but_dinov2():
    gains = paper.load(10).query("row == 'E+K+D' and column != 'DINOv2 ViT-B/14'")["delta"]
    assert len(gains) == 16
    assert paper.claims().set_index("id").loc["table10-mean", "paper_delta"] == round(
        gains.mean(), 1
    )


def test_an_unknown_table_lists_those_that_are_stored():
    with pytest.raises(
        ValueError, match=r"unknown table 'table17'.*table01, table02, .*table16, table19, table22"
    ):
        paper.load(17)


def test_every_figure_and_table_has_its_notebook():
    items = paper.items()
    printed = {
        "Algorithm 1",
        *(f"Fig. {i}" for i in range(1, 13)),
        *(f"Table {i}" for i in range(1, 23)),
    }
    assert set(items["item"]) == printed and items["item"].is_unique
    assert set(items["notebook"]) <= NOTEBOOKS and (items["shows"].str.len() > 5).all()
    claims = paper.claims().merge(items, on="item", suffixes=("", "_of_item"))
    assert len(claims) == (~paper.claims()["item"].isin(["Clustering", "Controls"])).sum()
    assert (claims["notebook"] == claims["notebook_of_item"]).all()


@pytest.mark.parametrize(
    "ours, expected",
    [
        ((4.0, 3.0, 5.0), "alike"),
        ((1.0, 0.5, 1.5), "smaller"),
        ((8.0, 6.0, 9.0), "larger"),
        ((-1.0, -2.0, -0.5), "other sign"),
        ((1.0, math.nan, math.nan), ""),
    ],
)
def test_the_size_of_a_difference_beside_the_papers(ours, expected):
    assert paper.size(4.4, *ours) == expected
    assert paper.size(math.nan, *ours) == ""
    mirrored = paper.size(-4.4, -ours[0], -ours[2], -ours[1])
    assert mirrored == expected


def test_the_overview_says_what_was_run_where_and_how_it_went(tmp_path, monkeypatch):
    monkeypatch.setenv("FUNGI_FIGURES", str(tmp_path))
    assert (paper.overview("mini")[["run", "minutes"]] == "").all(axis=None)
    assert set(paper.overview("mini")["ours"]) == {"", "not run"}
    (tmp_path / "lite").mkdir()
    record = {"notebook": "03_image_classification", "wall_seconds": 300}
    (tmp_path / "lite" / "a.json").write_text(json.dumps(record | {"wall_seconds": 1.0}))
    (tmp_path / "lite" / "b.json").write_text(json.dumps(record))
    ids = paper.claims().query("item == 'Table 2'")["id"].tolist()
    rows = [(ids[0], 0.5, -1.0, 2.0, "x"), *((other, 2.0, 1.0, 3.0, "x") for other in ids[1:])]
    paper.save_measured(
        pd.DataFrame(rows, columns=paper.MEASURED), "03_image_classification", "lite"
    )
    table = paper.overview("lite").set_index("item")
    row = table.loc["Table 2"]
    assert (row["run"], row["minutes"]) == ("lite", "5")
    assert (
        row["ours"]
        == "+0.5 [−1.0, +2.0], paper +1.0: undecided (of 5: 4 agrees, 1 undecided), lite"
    )
    assert table.loc["Table 5", "ours"] == "not run" and table.loc["Fig. 1", "ours"] == ""
    untested = [
        ("table1-pretraining", float("nan"), float("nan"), float("nan"), "needs two pretrainings")
    ]
    paper.save_measured(
        pd.DataFrame(untested, columns=paper.MEASURED), "03_image_classification", "mini"
    )
    assert (
        paper.overview("mini").set_index("item").loc["Table 1", "ours"] == "not testable here, mini"
    )


def test_the_committed_page_is_that_of_the_committed_figures(monkeypatch):
    """To mend: `python -m companion.paper`."""
    monkeypatch.setenv("FUNGI_FIGURES", str(ROOT / "figures"))
    page = (ROOT / "figures" / "lite" / "README.md").read_text(encoding="utf-8")
    assert page == paper.as_markdown("lite")
    assert sum(line.startswith("| ") for line in page.splitlines()) > 2 + len(paper.claims()) + 40
    for target in re.findall(r"\]\(([^)]+)\)", page):
        if target.startswith("#"):
            assert f'<a id="{target[1:]}"></a>' in page
        else:
            assert (ROOT / "figures" / "lite" / target).is_file()


def test_the_manifest_lists_every_figure_and_table_and_nothing_else(monkeypatch):
    """codecheck.yml against the committed files, and against what the notebooks write. To mend:
    `python -m companion.paper`.
    """
    monkeypatch.setenv("FUNGI_FIGURES", str(ROOT / "figures"))
    text = (ROOT / "codecheck.yml").read_text(encoding="utf-8")
    assert text == paper.manifest("lite")
    entries = yaml.safe_load(text)["manifest"]
    files = {str(file.relative_to(ROOT)) for file in (ROOT / "figures" / "lite").glob("*.csv")}
    assert {entry["file"] for entry in entries} == {
        file for file in files if not Path(file).name.startswith("claims_")
    }
    made = {(entry["command"].split()[3], Path(entry["file"]).name) for entry in entries}
    for slug in run.notebooks():
        if slug != "20_your_own_data":  # it writes on a click alone, about one's own photographs
            wanted = {name for name in written_files(slug) if name.endswith(".csv")}
            assert wanted <= {name for one, name in made if one == slug}, slug


def test_a_second_scorer_finds_the_committed_gains_and_verdicts():
    done = subprocess.run(
        [sys.executable, "benchmarks/rescore.py"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "DIFFERS" not in done.stdout, done.stdout + done.stderr


def test_the_second_scorer_sees_a_changed_outcome(tmp_path):
    for name in ("table02_outcomes.csv", "table02_gradients.csv"):
        shutil.copy(ROOT / "figures" / "lite" / name, tmp_path)
    shutil.copy(ROOT / "figures" / "lite" / "claims_03_image_classification.csv", tmp_path)
    file = tmp_path / "table02_outcomes.csv"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    (row,) = [i for i, line in enumerate(lines) if line.startswith("E+K+D+S,0,")][:1]
    features, seed, digits, *rest = lines[row].split(",")
    lines[row] = ",".join([features, seed, digits.replace("0", "1", 1), *rest])  # one image
    file.write_text("".join(lines), encoding="utf-8")
    command = [sys.executable, "benchmarks/rescore.py", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and " 3 differ" in done.stdout  # accuracy, gain and step


@pytest.mark.parametrize(
    "on, scale",
    [
        ("dtd_10, cifar10; deit_tiny_patch16_224.fb_in1k", "paper's kind"),
        ("classes of dtd_10; deit_tiny_patch16_224.fb_in1k", "stand-in"),
        ("voc2012_part; deit_tiny_patch16_224.fb_in1k (83 images)", "paper's kind"),
        ("dtd_10; vit_micro.sup_tin100, deit_tiny_patch16_224.fb_in1k", "stand-in"),
        ("tiny_imagenet_100a; deit_tiny_patch16_224.fb_in1k", "stand-in"),
        ("noise; deit_tiny_patch16_224.fb_in1k", "stand-in"),  # a speed
        ("needs the Paris landmarks", ""),
        (float("nan"), ""),
    ],
)
def test_scale_says_how_near_the_paper_a_claim_was_tested(on, scale):
    assert paper.scale(on) == scale


def test_an_undecided_claim_names_the_effect_that_could_have_been_seen(tmp_path, monkeypatch):
    monkeypatch.setenv("FUNGI_FIGURES", str(tmp_path))
    bare = float("nan"), float("nan")
    rows = [("table2-k", 1.0, -1.0, 4.0), ("table2-d", 2.0, 1.0, 3.0), ("fig5-full", 0.0, *bare)]
    measured = pd.DataFrame([(*row, "x") for row in rows], columns=paper.MEASURED)
    paper.save_measured(measured, "03_image_classification", "mini")
    page = paper.as_markdown("mini").partition('id="claims"')[2].splitlines()
    said = lambda verdict: [line.split(" | ")[4] for line in page if f" | {verdict}" in line]
    assert said("undecided") == ["undecided", "undecided (±2.5 could be seen)"]
    assert said("agrees") == ["agrees"]


def test_a_page_lists_claims_by_verdict_and_what_was_written(tmp_path, monkeypatch):
    monkeypatch.setenv("FUNGI_FIGURES", str(tmp_path))
    rows = [("table2-k", -1.0, -1.5, -0.5, "x"), ("table2-d", 2.0, 1.0, 3.0, "x")]
    measured = pd.DataFrame(rows, columns=paper.MEASURED)
    paper.save_measured(measured, "03_image_classification", "mini")
    for name, drawn in (("fig05_fig11_bars", True), ("table01_sets", False)):
        record = {"notebook": "03_image_classification"}
        (tmp_path / "mini" / f"{name}.json").write_text(json.dumps(record))
        if drawn:
            (tmp_path / "mini" / f"{name}.png").touch()
    page = paper.as_markdown("mini")
    rest = len(paper.claims()) - 2
    assert f"disagrees 1, undecided 0, agrees 1, not testable here 0, not run {rest}." in page
    lines = [line.split(" | ") for line in page.splitlines() if line.startswith("| Table 2 ")]
    assert [line[2:5] for line in lines[:2]] == [
        ["+1.0", "−1.0 [−1.5, −0.5]", "disagrees"],
        ["+1.8", "+2.0 [+1.0, +3.0]", "agrees"],
    ]
    assert "![Figure fig05_fig11_bars](fig05_fig11_bars.png)\n\nFig. 5, Fig. 11: [`fig05_" in page
    assert "- Table 1: [`table01_sets`](table01_sets.csv), a table" in page  # it is no picture
    assert "python -m companion.run 03_image_classification --profile mini" in page
    assert page.count("| Table 2 | Adding the KL gradient") == 2  # on its page, and among all


def test_figures_elsewhere_are_not_mixed_with_those_of_this_checkout(monkeypatch, tmp_path):
    """Only what is committed is read from it; what a run left in it is not."""
    monkeypatch.setattr(paths, "ROOT", tmp_path / "checkout")
    for profile in ("mini", "lite"):
        (tmp_path / "checkout" / "figures" / profile).mkdir(parents=True)
    monkeypatch.setenv("FUNGI_FIGURES", str(tmp_path / "elsewhere"))
    assert paths.results_dir("mini") == tmp_path / "elsewhere" / "mini"
    assert paths.results_dir("lite") == tmp_path / "checkout" / "figures" / "lite"
    (tmp_path / "elsewhere" / "lite").mkdir(parents=True)
    assert paths.results_dir("lite") == tmp_path / "elsewhere" / "lite"


FULL, ALL = "setting == 'full' and features == ", "features == 'E+K+D+S'"
AGAINST = "variant == {!r} and against == {!r}"


def test_the_smallest_of_the_committed_gains_has_the_lowest_bounds():
    rows = pd.read_csv(ROOT / "figures" / "lite" / "table09_seeds.csv").query(ALL)
    low, high = rows["low"] - rows["gain ± seeds"], rows["high"] + rows["gain ± seeds"]
    stored = paper.scoreboard("lite").set_index("id").loc["table9-seeds", ["value", "low", "high"]]
    assert tuple(stored) == pytest.approx((rows["gain"].min(), low.min(), high.min()), rel=1e-3)


POOLED = {  # claim: the committed rows, one a network and data set, whose mean it is
    "table1-mean": ("table02_gradients", FULL + "'E+K+D+S'", "gain"),
    "table2-all": ("table02_gradients", FULL + "'E+K+D+S'", "gain"),
    "table2-few": ("table02_gradients", "setting == '5-shot' and " + ALL, "gain"),
    "table2-k": ("table02_gradients", FULL + "'E+K'", "step"),
    "table2-d": ("table02_gradients", FULL + "'E+K+D'", "step"),
    "table2-s": ("table02_gradients", FULL + "'E+K+D+S'", "step"),
    "fig6-few-shots": ("fig06_gain", "features == 'E+K+S'", "gain"),
    "table5-kl": ("table05_gains", FULL + "'E+K'", "gain"),
    "table5-simclr": ("table05_gains", FULL + "'E+K+S'", "step"),
    "table10-mean": ("table10_by_dataset", "features == 'E+K+D'", "gain"),
    "table11-kl": ("table11_gains", FULL + "'E+K'", "gain"),
    "table11-simclr": ("table11_gains", FULL + "'E+K+S'", "step"),
    "table13-supervised": ("table13_gradients", FULL + "'E+K+D'", "gain"),
    "clustering-accuracy": ("clustering_features", "setting == 'accuracy' and " + ALL, "gain"),
    "control-both": ("controls", AGAINST.format("FUNGI and views' means", "views' means"), "gain"),
    "control-pixels": ("controls", AGAINST.format("E+K", "E+K, shuffled pixels"), "gain"),
    "control-projection": ("controls", AGAINST.format("exact products", "projected to d"), "gain"),
    "control-views": ("controls", AGAINST.format("FUNGI", "views' means"), "gain"),
    "control-signs": ("controls", AGAINST.format("FUNGI", "random signs"), "gain"),
}


@pytest.mark.parametrize("claim", POOLED)
def test_a_committed_mean_follows_from_its_committed_rows(claim):
    """Else one of the two is of an estimator that the project has left."""
    table, query, kind = POOLED[claim]
    rows = pd.read_csv(ROOT / "figures" / "lite" / f"{table}.csv").query(query)
    names = [name.replace("gain", kind) for name in protocol.GAIN]
    rows = rows[["backbone", *names]].set_axis(["backbone", *protocol.GAIN], axis=1)
    stored = paper.scoreboard("lite").set_index("id").loc[claim, ["value", "low", "high"]]
    assert len(rows) > 2
    assert protocol.pooled(rows) == pytest.approx(tuple(stored), rel=1e-3, abs=1e-3)


def test_the_answers_of_the_controls_are_the_committed_numbers():
    notebook = (paths.ROOT / "notebooks" / "23_controls.ipynb").read_text(encoding="utf-8")
    board = paper.scoreboard("lite").query("notebook == '23_controls'")
    for row in board.itertuples():
        assert paper.ours(row.value, row.low, row.high) in notebook, row.id


@pytest.mark.parametrize(
    ("slug", "table", "query", "columns"),
    [
        ("21_projections", "projections_table", DENSE, ["against exact", "low", "high"]),
        ("24_views", "views_differences", "question != ''", ["difference", "low", "high"]),
        ("25_sizes", "fig11_sizes_means", "features == 'E+K+D+S'", protocol.GAIN),
    ],
)
def test_a_text_on_lite_quotes_the_committed_table(slug, table, query, columns):
    notebook = (paths.ROOT / "notebooks" / f"{slug}.ipynb").read_text(encoding="utf-8")
    rows = pd.read_csv(paths.ROOT / "figures" / "lite" / f"{table}.csv").query(query)
    assert len(rows) >= 2
    for row in rows[columns].to_numpy():
        assert paper.ours(*row) in notebook


def test_nothing_is_minus_zero():
    assert [paper.signed(x) for x in (-0.04, 0.0, -0.06)] == ["+0.0", "+0.0", "−0.1"]
    shown = style.show_table(pd.DataFrame({"a": [-0.04, -1e-16, -0.06], "b": [0, 1, 2]})).to_html()
    assert re.findall(r">(-?[\d.]+)</td>", shown) == ["0.0", "0", "0.0", "1", "-0.1", "2"]

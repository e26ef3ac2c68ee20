"""The static site: executed notebooks, the gallery of figures and the scoreboard as pages that open
from disk.

    python -m companion.site --profile lite --out build/site

Nothing is executed: a page is the run of that profile, where its code is still the notebook's, else
the committed one. Nothing is loaded from elsewhere: formulas become MathML, images lie beside the
pages, there is no script.
"""

import argparse
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat
from bs4 import BeautifulSoup
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from PIL import Image
from pygments.formatters import HtmlFormatter

from companion import paper, paths, run
from companion.figures.style import VERDICTS

TEMPLATES = paths.ROOT / "data" / "site"


def build(out: Path, profile: str = "lite") -> list[Path]:
    """Write the site into the folder ``out``, where it replaces an earlier one; return its pages,
    the index first.

    Executed notebooks are those of runs/``profile``, figures and claims of figures/``profile``.
    Raises ValueError for a folder that holds anything but a site.
    """
    sources = [run.NOTEBOOKS / f"{slug}.ipynb" for slug in run.notebooks()]
    runs = paths.ROOT / "runs" / profile
    if out.exists() and any(out.iterdir()) and not (out / "scoreboard.html").is_file():
        raise ValueError(f"{out} holds something else than a site; name another folder")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / "scoreboard.html").touch()  # says whose folder it is, should this one be killed
    read = [executed(path, runs / path.name) for path in sources]
    pages = [
        {"slug": path.stem, "title": paper.title(nb), "profile": ran}
        for path, (nb, ran) in zip(sources, read, strict=True)
    ]
    figures = gallery(out, profile)
    shared = {"pages": pages, "slugs": [page["slug"] for page in pages], "figures": figures}
    shared |= {"profile": profile, "colours": VERDICTS} | judged(profile, figures)
    env = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters["anchor"], env.globals["ours"] = anchor, paper.ours
    code, dark = (
        HtmlFormatter(style=name).get_style_defs(".highlight pre")
        for name in ("default", "github-dark")
    )
    dark = f"@media (prefers-color-scheme: dark) {{ {dark} }}"
    style = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    (out / "style.css").write_text("\n".join([style, code, dark]), encoding="utf-8")
    written = [write(out, env, name, shared) for name in ("index", "scoreboard")]
    around = zip([None, *pages[:-1]], pages, [*pages[1:], None], read, strict=True)
    for before, page, after, (nb, _) in around:
        here = {"page": page, "before": before, "after": after, "body": body(nb, shared["slugs"])}
        here["own"] = [f for f in figures if f["notebook"] == page["slug"] and f["size"]]
        written.append(write(out, env, "notebook", shared | here, page["slug"]))
    return written


def write(out: Path, env: Environment, template: str, values: dict, name: str = "") -> Path:
    """Write one page from its template; return its path."""
    path = out / f"{name or template}.html"
    path.write_text(env.get_template(f"{template}.html").render(**values), encoding="utf-8")
    return path


def judged(profile: str, figures: list[dict]) -> dict:
    """Return the claims with the disagreements first, how many have which verdict, and the paper's
    items, each with its verdicts and figures.
    """
    board = paper.scoreboard(profile)
    claims, counts = paper.by_verdict(board)
    items = paper.items().to_dict("records")
    for row in items:
        row["verdicts"] = (
            board.loc[board["item"] == row["item"], "verdict"].value_counts().to_dict()
        )
        row["figures"] = [figure for figure in figures if row["item"] in figure["items"]]
    return {"claims": claims, "counts": counts, "items": items}


def executed(source: Path, ran: Path) -> tuple[nbformat.NotebookNode, str]:
    """Return a notebook with outputs and the profile that it ran with: ``ran`` where its code is
    that of ``source``, which is the committed one.
    """

    def code(notebook) -> list[str]:
        given = "injected-parameters"  # papermill's own cell
        cells = [c for c in notebook.cells if given not in c.metadata.get("tags", [])]
        return [cell.source.strip() for cell in cells]

    committed = nbformat.read(source, 4)
    if not ran.is_file():
        return committed, "mini"
    other, profile = nbformat.read(ran, 4), ran.parent.name
    if code(other) == code(committed):
        return other, profile
    print(f"{source.stem}: its run in {profile} is of other code; the committed page is shown")
    return committed, "mini"


def body(nb: nbformat.NotebookNode, slugs: Sequence[str]) -> str:
    """Return a notebook's cells as HTML: alt texts, MathML, folded code, links between pages."""
    for cell, text in zip(nb.cells, alternatives(nb), strict=True):
        cell.metadata["alt"] = text
        cell.outputs = [o for o in cell.get("outputs", []) if o.get("name") != "stderr"]
    no_prompts = dict(exclude_input_prompt=True, exclude_output_prompt=True)
    exporter = HTMLExporter(
        template_name="basic", filters={"markdown2html": markdown}, **no_prompts
    )
    soup = BeautifulSoup(exporter.from_notebook_node(nb)[0], "html.parser")
    for link in soup.select("a[href]"):
        link["href"] = re.sub(r"^(\d\d_\w+)\.ipynb", r"\1.html", link["href"])
        link["href"] = re.sub(r"^\.\./figures/\w+/README\.md", "index.html#gallery", link["href"])
    for code in soup.select(":not(pre):not(a) > code"):
        if code.text in slugs:
            code.wrap(soup.new_tag("a", href=f"{code.text}.html"))
    for source in soup.select("div.input"):
        tags = " ".join(source.find_parent(class_="cell")["class"])
        given = "parameters" if "celltag" in tags else "code"
        summary = soup.new_tag("summary")
        summary.string = "parameters given" if "injected" in tags else given
        source.wrap(soup.new_tag("details")).insert(0, summary)
    box = {"class": "scroll", "tabindex": "0", "role": "region", "aria-label": "table"}
    for wide in soup.select("table"):  # a wide table scrolls in its own box, not with the page
        wide.wrap(soup.new_tag("div", attrs=box))
    return str(soup)


def alternatives(nb: nbformat.NotebookNode) -> list[str]:
    """Return each cell's image text: title, heading above, and the "How to read it" after it."""
    heading, texts = "", []
    said = [cell.source if cell.cell_type == "markdown" else "" for cell in nb.cells]
    for here, after in zip(said, [*said[1:], ""], strict=True):
        if found := re.findall(r"^#+ +(.+)$", here, re.MULTILINE):
            heading = f": {found[-1]}" if found[-1] != paper.title(nb) else ""
        read = re.match(r"\*\*How to read it\.?\*\*\s*(.+)", after)
        text = f"{paper.title(nb)}{heading}. {read[1] if read else ''}"
        texts.append(" ".join(re.sub(r"[*`$\\]", "", text).split()))
    return texts


class Formulas(IPythonRenderer):
    """Markdown with its formulas as MathML, which browsers set without a script."""

    def inline_math(self, body: str) -> str:
        return convert(body)

    def block_math(self, body: str) -> str:
        return f'<span class="scroll">{convert(body, display="block")}</span>'


def markdown(source: str) -> str:
    """Return Markdown as HTML, as nbconvert's filter does, with formulas as MathML."""
    renderer = Formulas(escape=False, exclude_anchor_links=True)
    return MarkdownWithMath(renderer=renderer).render(source)


def gallery(out: Path, profile: str) -> list[dict]:
    """Copy figures and numbers of a profile into the site; return `paper.written` of each, with the
    file to link to and the figure's size, None for a table.
    """
    folder, found = paths.results_dir(profile), []
    (out / "figures").mkdir()
    for figure in paper.written(profile):
        name, size = figure["name"], None
        shutil.copy(folder / f"{name}.csv", out / "figures")
        if figure["drawn"]:
            image = Image.open(folder / f"{name}.png").convert("RGB")
            image.save(out / "figures" / f"{name}.webp", lossless=True)
            size = image.size
        found.append(figure | {"file": f"{name}.{'webp' if size else 'csv'}", "size": size})
    return found


def anchor(text: str) -> str:
    """Return a text as the name of a place on a page: "Fig. 2" -> "fig-2"."""
    return re.sub(r"\W+", "-", text.lower()).strip("-")


def main(argv: list[str] | None = None) -> None:
    """Build the site of a profile and say where it is."""
    parser = argparse.ArgumentParser("python -m companion.site", description="Build the site.")
    add, folder = parser.add_argument, paths.ROOT / "build" / "site"
    add("--profile", default="lite", choices=run.profiles(), help="whose figures and runs (lite)")
    add("--out", type=Path, default=folder, help="folder, replaced (build/site)")
    args = parser.parse_args(argv)
    try:
        pages = build(args.out, args.profile)
    except ValueError as error:
        sys.exit(f"site: {error}")
    size = sum(p.stat().st_size for p in args.out.rglob("*") if p.is_file()) / 1e6
    print(f"{len(pages)} pages, {size:.1f} MB: open {pages[0]}")


if __name__ == "__main__":
    main()

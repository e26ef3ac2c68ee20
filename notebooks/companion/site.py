"""The static site: executed notebooks, the gallery of figures and the scoreboard as pages that open
from disk.

    python -m companion.site --profile lite --out build/site

Nothing is executed: a page is the run of that profile, where its code is still the notebook's, else
the committed one. Nothing is loaded from elsewhere: formulas become MathML, images lie beside the
pages, there is no script.
"""

import argparse
import json
import re
import shutil
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
THUMBNAIL = 560  # pixels: two for each one of a gallery column


def build(
    out: Path, profile: str = "lite", notebooks: Path = run.NOTEBOOKS, runs: Path | None = None
) -> list[Path]:
    """Write the site into the folder ``out``, which is replaced; returns its pages, the index
    first.

    ``notebooks``: the committed ones; ``runs``: executed ones (default runs/``profile``); figures
    and measured claims are those of figures/``profile``. A folder without notebooks raises
    ValueError.
    """
    sources = sorted(notebooks.glob("[0-9][0-9]_*.ipynb"))
    if not sources:
        raise ValueError(f"no notebooks NN_slug.ipynb in {notebooks}")
    runs = runs or paths.ROOT / "runs" / profile
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    read = [executed(path, runs / path.name) for path in sources]
    pages = [
        {"slug": p.stem, "title": title(nb), "profile": ran}
        for p, (nb, ran) in zip(sources, read, strict=True)
    ]
    slugs = [page["slug"] for page in pages]
    drawn = gallery(out, paths.figures_dir() / profile)
    board = paper.scoreboard(profile)
    board["order"] = board["verdict"].map(list(VERDICTS).index)
    claims = board.sort_values("order", kind="stable").to_dict("records")
    items = [
        row
        | {
            "verdicts": board.loc[board["item"] == row["item"], "verdict"].value_counts().to_dict(),
            "figures": [f for f in drawn if row["item"] in f["items"]],
        }
        for row in paper.items().to_dict("records")
    ]
    shared = {
        "pages": pages,
        "slugs": slugs,
        "figures": drawn,
        "claims": claims,
        "items": items,
        "profile": profile,
        "colours": VERDICTS,
        "counts": board["verdict"].value_counts().reindex(VERDICTS).dropna().astype(int),
    }
    env = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"points": points, "anchor": anchor}
    style = (TEMPLATES / "style.css").read_text() + HtmlFormatter().get_style_defs(".highlight")
    (out / "style.css").write_text(style, encoding="utf-8")
    written = [_write(out, env, name, shared) for name in ("index", "scoreboard")]
    around = zip([None, *pages[:-1]], pages, [*pages[1:], None], read, strict=True)
    for before, page, after, (nb, _) in around:
        here = {"page": page, "before": before, "after": after, "body": body(nb, slugs)}
        here["own"] = [f for f in drawn if f["notebook"] == page["slug"]]
        written.append(_write(out, env, "notebook", shared | here, page["slug"]))
    return written


def executed(source: Path, ran: Path) -> tuple[nbformat.NotebookNode, str]:
    """A notebook with outputs and the profile it ran with: ``ran`` where its cells are those of
    ``source``.
    """
    committed = nbformat.read(source, 4)
    if ran.is_file():
        other = nbformat.read(ran, 4)
        if _code(other) == _code(committed):
            return other, ran.parent.name
        print(
            f"{source.stem}: the run in {ran.parent.name} is of other code; its page shows the committed notebook"
        )
    return committed, "mini"


def _code(nb: nbformat.NotebookNode) -> list[str]:
    cells = [c for c in nb.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    return [c.source.strip() for c in cells]


def title(nb: nbformat.NotebookNode) -> str:
    """The first heading, without its mark."""
    return nb.cells[0].source.splitlines()[0].lstrip("# ")


def body(nb: nbformat.NotebookNode, slugs: Sequence[str]) -> str:
    """A notebook's cells as HTML: alternative texts, formulas as MathML, code folded, links between
    pages relative.
    """
    for cell in nb.cells:
        cell.outputs = [
            o
            for o in cell.get("outputs", [])
            if not (o.output_type == "stream" and o.name == "stderr")
        ]
    for cell, text in zip(nb.cells, alternatives(nb), strict=True):
        cell.metadata["alt"] = text
    exporter = HTMLExporter(template_name="basic", filters={"markdown2html": markdown})
    soup = BeautifulSoup(exporter.from_notebook_node(nb)[0], "html.parser")
    for link in soup.select("a[href]"):
        link["href"] = re.sub(r"^(\d\d_\w+)\.ipynb", r"\1.html", link["href"])
    for code in soup.select(":not(pre):not(a) > code"):
        if code.text in slugs:
            code.wrap(soup.new_tag("a", href=f"{code.text}.html"))
    for source in soup.select("div.input"):
        fold = source.wrap(soup.new_tag("details"))
        fold.insert(0, summary := soup.new_tag("summary"))
        tags = " ".join(source.find_parent(class_="cell")["class"])
        summary.string = (
            "parameters given"
            if "injected" in tags
            else "parameters"
            if "celltag" in tags
            else "code"
        )
    for prompt in soup.select("div.prompt"):
        prompt.decompose()
    box = {"class": "scroll", "tabindex": "0", "role": "region", "aria-label": "table"}
    for wide in soup.select("table"):  # a wide table scrolls in its own box, not with the page
        wide.wrap(soup.new_tag("div", attrs=box))
    return str(soup)


def alternatives(nb: nbformat.NotebookNode) -> list[str]:
    """A text for the images of each cell: title, the heading above it and the page's own "How to
    read it" after it.
    """
    heading, texts = "", []
    for i, cell in enumerate(nb.cells):
        if cell.cell_type == "markdown" and (
            found := re.findall(r"^#+ +(.+)$", cell.source, re.MULTILINE)
        ):
            heading = f": {found[-1]}" if found[-1] != title(nb) else ""
        after = (
            nb.cells[i + 1].source
            if i + 1 < len(nb.cells) and nb.cells[i + 1].cell_type == "markdown"
            else ""
        )
        read = re.match(r"\*\*How to read it\.?\*\*\s*(.+)", after)
        texts.append(_plain(f"{title(nb)}{heading}. {read[1] if read else ''}"))
    return texts


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[*`$\\]", "", text).split())


class _Formulas(IPythonRenderer):
    """Markdown with its formulas as MathML, which browsers set without a script."""

    def inline_math(self, body: str) -> str:
        return convert(body)

    def block_math(self, body: str) -> str:
        return f'<span class="scroll">{convert(body, display="block")}</span>'


def markdown(source: str) -> str:
    """nbconvert's Markdown filter, with formulas as MathML."""
    return MarkdownWithMath(renderer=_Formulas(escape=False, exclude_anchor_links=True)).render(
        source
    )


def gallery(out: Path, folder: Path) -> list[dict]:
    """Copy the figures of ``folder`` into the site, whole and as thumbnails; name, notebook, paper
    items, size, alt.
    """
    for sub in ("figures", "thumbnails"):
        (out / sub).mkdir()
    found = []
    for path in sorted(folder.glob("*.png")):
        record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        image = Image.open(path).convert("RGB")
        image.save(out / "figures" / f"{path.stem}.webp", lossless=True)
        small = image.copy()
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        small.save(out / "thumbnails" / f"{path.stem}.webp", quality=85)
        shutil.copy(path.with_suffix(".csv"), out / "figures")
        kinds = {"fig": "Fig.", "table": "Table"}
        items = [
            f"{kinds[kind]} {int(n)}"
            for kind, n in re.findall(r"(?:^|_)(fig|table)(\d\d)(?=_|$)", path.stem)
        ]
        alt = record.get("alt", f"Figure {path.stem}")
        here = {
            "name": path.stem,
            "notebook": record["notebook"],
            "items": items,
            "size": small.size,
            "alt": alt,
        }
        found.append(here)
    return found


def points(row: dict) -> str:
    """Ours with its interval, as text; a dash where there is none."""
    if row["value"] != row["value"]:
        return "–"
    number = lambda x: f"{x:+.2f}".replace("-", "−")
    interval = "" if row["low"] != row["low"] else f" [{number(row['low'])}, {number(row['high'])}]"
    return number(row["value"]) + interval


def anchor(text: str) -> str:
    """ "Fig. 2" -> "fig-2"."""
    return re.sub(r"\W+", "-", text.lower()).strip("-")


def _write(
    out: Path, env: Environment, template: str, values: dict, name: str | None = None
) -> Path:
    path = out / f"{name or template}.html"
    path.write_text(env.get_template(f"{template}.html").render(**values), encoding="utf-8")
    return path


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m companion.site", description="Build the static site."
    )
    parser.add_argument(
        "--profile", default="lite", choices=run.profiles(), help="whose figures and runs (lite)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=paths.ROOT / "build" / "site",
        help="folder, replaced (build/site)",
    )
    args = parser.parse_args(argv)
    pages = build(args.out, args.profile)
    size = sum(p.stat().st_size for p in args.out.rglob("*") if p.is_file()) / 1e6
    print(f"{len(pages)} pages, {size:.1f} MB: open {pages[0]}")


if __name__ == "__main__":
    main()

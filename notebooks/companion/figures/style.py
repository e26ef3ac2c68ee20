"""The one look of figures and tables, and how they are written.

A figure is a PNG, a PDF, its numbers as CSV and its provenance as JSON; a table is a CSV and a
JSON. Writing is atomic (a file is whole or absent), and a second run writes the same PNG, PDF and
CSV byte for byte; the JSON holds times. What panels share is in
`panels`, the drawings are in `plots` and `grids`.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Image
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler
from seaborn.utils import relative_luminance

from companion import explore
from companion.messages import require

COLUMN, PAGE = 85 / 25.4, 160 / 25.4  # widths in inches: a column of 85 mm, a page of 160 mm
SMALL = 8  # points: the smallest text, 9 pixels high from 85 dots an inch on
INK, PALE = "#333333", "#888888"

FEATURES = (  # letter, stored block, name, colour
    ("E", "embedding", "embedding", "#555555"),
    ("K", "kl", "KL", "#E69F00"),
    ("D", "dino", "DINO", "#0072B2"),
    ("S", "simclr", "SimCLR", "#009E73"),
    ("C", "deepcluster", "DeepCluster", "#56B4E9"),
    ("I", "ibot", "iBOT", "#7A4B1E"),
    ("M", "mlm", "masked words", "#3B3B98"),
)
LETTERS = {block: letter for letter, block, _, _ in FEATURES}
NAMES = {letter: name for letter, _, name, _ in FEATURES}
# After Okabe and Ito (2008), safe for colour-blind readers: the embedding is neutral, each gradient
# has a hue, and sets of features end at FUNGI's vermillion.
COLOURS = {letter: ink for letter, _, _, ink in FEATURES} | {
    "E+K": "#CC79A7",
    "E+K+D": "#8F4A8C",
    "E+K+D+S": "#D55E00",
}
FUNGI = COLOURS["E+K+D+S"]
VERDICTS = {  # the disagreements first
    "disagrees": "#B84A00",
    "undecided": "#E69F00",
    "agrees": "#0072B2",
    "not testable here": "#333333",
    "not run": "#999999",
}


def figure(
    rows: int = 1, cols: int = 1, *, width: float = PAGE, height: float = 2.4, **subplots
) -> tuple[Figure, np.ndarray]:
    """Return a figure of `width` x `height` inches in the project's style, and its axes
    (rows, cols); `subplots` are options of `Figure.subplots`.
    """
    plt.style.use(Path(__file__).with_name("fungi.mplstyle"))
    fig = plt.figure(figsize=(width, height), layout="constrained")
    plt.close(fig)  # pyplot forgets it: a notebook shows it once, as the value of its cell
    return fig, fig.subplots(rows, cols, squeeze=False, **subplots)


def colour(features: str) -> str:
    """Return the hex colour of a feature set in letters ("E", "K", "E+K+D").

    Sets without a colour of their own share that of their size. Raises ValueError for an unknown
    letter.
    """
    letters = features.split("+")
    for letter in letters:
        require("feature letter", letter, NAMES)
    return COLOURS.get(features) or COLOURS["+".join("EKDS"[: len(letters)])]


def contrast(fill: str) -> str:
    """Return black or white, whichever reads better on the colour `fill` (WCAG luminance)."""
    return "black" if relative_luminance(fill) > 0.179 else "white"


def save_figure(
    fig: Figure, name: str, data: pd.DataFrame, provenance: Mapping, folder: Path
) -> dict[str, Path]:
    """Write NAME.png, .pdf, .csv (`data`: the numbers drawn) and .json, and return their paths by
    suffix. The JSON holds `provenance` and, as "alt", what the image shows.

    Everything is rendered before the first file is touched. Raises ValueError for a name of other
    characters than lower-case letters, digits and underscores.
    """
    png, pdf = io.BytesIO(), io.BytesIO()
    fig.savefig(png, format="png", metadata={"Software": None})
    fig.savefig(pdf, format="pdf", metadata={"CreationDate": None})
    pictures = {"png": png.getvalue(), "pdf": pdf.getvalue()}
    return _save(name, data, dict(provenance) | {"alt": describe(fig)}, folder, pictures)


def save_table(table: pd.DataFrame, name: str, provenance: Mapping, folder: Path) -> None:
    """Write NAME.csv and .json, as `save_figure` does."""
    _save(name, table, dict(provenance) | {"alt": _describe_table(table)}, folder, {})


class Table(Styler):
    """A styled table that is a sentence where HTML is not shown."""

    def __repr__(self) -> str:
        return _describe_table(self.data)


def show_table(table: pd.DataFrame, decimals: int = 1, html: Sequence[str] = ()) -> Table:
    """Return a table for display in a notebook, in the colours of its theme: numbers on the right
    with `decimals` digits, words on the left, long words in wide columns, missing cells as a dash,
    verdicts in their colours, columns named "paper..." grey. A named index becomes columns. The
    columns ``html`` hold HTML already: links.
    """
    table = _flat(table).reset_index(drop=True)
    # An id made from the contents: the same table has the same HTML, two tables have two ids.
    name = hashlib.sha256(table.to_csv().encode()).hexdigest()[:8]
    styled = Table(table, uuid=name, cell_ids=False).hide(axis="index")
    floats = dict.fromkeys(table.select_dtypes("float"), f"{{:z.{decimals}f}}".format)  # no -0.0
    styled = styled.format(floats, precision=decimals, na_rep="–", escape="html")
    styled = styled.format(str, subset=list(html))
    # Names of data sets and backbones stay whole.
    end = re.compile(r"_(?=(low|high|spread|ratio)$)")
    styled = styled.format_index(lambda head: end.sub(" ", str(head)), axis="columns")
    read = table.assign(**{x: table[x].str.replace("<[^>]+>", "", regex=True) for x in html})
    looks = {column: _look(read[column]) for column in table}
    styled = styled.set_table_styles(looks, overwrite=False)
    verdicts = [column for column in table if column == "verdict"]
    return styled.map(_chip, subset=verdicts)


def _describe_table(table: pd.DataFrame) -> str:
    """Return the alternative text of a table, for those who cannot see it."""
    # Heads of several levels are tuples.
    levels = [head if isinstance(head, tuple) else (head,) for head in table.columns]
    heads = ", ".join(" ".join(filter(None, map(str, parts))) for parts in levels)
    return f"Table of {len(table)} row{'s' * (len(table) != 1)}: {heads}."


def _look(column: pd.Series) -> list[dict]:
    """Return how a column of a table and its head are set, as styles of `pandas`."""
    if pd.api.types.is_numeric_dtype(column):
        look = [("text-align", "right")]
    else:
        look = [("text-align", "left"), ("vertical-align", "top"), ("white-space", "normal")]
        if column.astype(str).str.len().max() > 40:
            look.append(("min-width", "22em"))
    if str(column.name).startswith("paper"):
        look.append(("color", "#777777"))  # reads on white and on black
    return [{"selector": selector, "props": look} for selector in ("td", "th")]


def _chip(verdict: str) -> str:
    """Return a verdict's own ground and ink, which read alike in light and dark themes."""
    ground = VERDICTS.get(verdict)
    return f"background-color: {ground}; color: {contrast(ground)}" if ground else ""


def _flat(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table with a named index, which carries numbers too, as columns."""
    return table.reset_index() if any(n is not None for n in table.index.names) else table


def describe(fig: Figure) -> str:
    """Return the alternative text of a figure: the words of its titles, axes and key."""
    legends = [text.get_text() for legend in fig.legends for text in legend.get_texts()]
    above = [fig.get_suptitle(), *(legend.get_title().get_text() for legend in fig.legends)]
    words = {
        "Titles": above + [ax.get_title("left") or ax.get_title() for ax in fig.axes],
        "Vertical": [ax.get_ylabel() for ax in fig.axes] + [fig.get_supylabel()],
        "Horizontal": [ax.get_xlabel() for ax in fig.axes] + [fig.get_supxlabel()],
        "Key": legends,
    }
    said = [f"Plot of {len(fig.axes)} panel{'s' * (len(fig.axes) != 1)}."]
    for head, texts in words.items():
        texts = list(dict.fromkeys(" ".join(text.split()) for text in texts if text.strip()))
        if texts:
            said.append(f"{head}: {'; '.join(texts[:8])}{' and more' * (len(texts) > 8)}.")
    return " ".join(said)


def photographs(fig: Figure) -> Image:
    """Return a figure of photographs as JPEG for a notebook's output: a fifth of the PNG."""
    sharp = explore.live()  # for a reader's screen of high density; committed pages stay small
    dpi = fig.dpi * (2 if sharp else 1)
    fig.savefig(file := io.BytesIO(), format="jpeg", dpi=dpi, pil_kwargs={"quality": 72})
    return Image(data=file.getvalue(), format="jpeg", retina=sharp)


def _save(
    name: str, data: pd.DataFrame, record: dict, folder: Path, pictures: dict[str, bytes]
) -> dict[str, Path]:
    """Write pictures by suffix, numbers and record, and return their paths by suffix."""
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise ValueError(f"name {name!r}: use lower-case letters, digits and underscores only")
    csv = _flat(data).to_csv(index=False, float_format="%.6g", lineterminator="\n")
    text = json.dumps(record, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    contents = {**pictures, "csv": csv.encode(), "json": text.encode()}
    folder.mkdir(parents=True, exist_ok=True)
    found = {suffix: folder / f"{name}.{suffix}" for suffix in contents}
    for suffix, file in found.items():
        write(file, contents[suffix])
    return found


def write(file: Path, content: bytes) -> None:
    """Write a file whole, or leave it as it was."""
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)

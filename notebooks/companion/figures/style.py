"""The one plotting style, and how a figure or a table is written.

A figure is PNG, PDF, its numbers as CSV and its provenance as JSON; a table is CSV and JSON. The
drawings are in `plots` and `grids`; no other module imports matplotlib. Writing is atomic (a file is
whole or absent), and a second run writes the same PNG, PDF and CSV byte for byte; the JSON holds times.
"""

import io
import os
import re
from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Image
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler
from PIL import Image as Picture

from companion import paths
from companion.provenance import as_json

COLUMN, WIDE = 3.3, 6.2  # widths in inches: one column of a page, and two

# After Okabe and Ito (2008), safe for colour-blind readers: embedding neutral, a hue a gradient,
# FUNGI vermillion.
COLOURS = {
    "E": "#555555",
    "K": "#E69F00",
    "D": "#0072B2",
    "S": "#009E73",
    "C": "#56B4E9",
    "I": "#7A4B1E",
    "M": "#3B3B98",
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
LETTERS = {
    "embedding": "E",
    "kl": "K",
    "dino": "D",
    "simclr": "S",
    "deepcluster": "C",
    "ibot": "I",
    "mlm": "M",
}
NAMES = {
    "E": "embedding",
    "K": "KL",
    "D": "DINO",
    "S": "SimCLR",
    "C": "DeepCluster",
    "I": "iBOT",
    "M": "masked words",
}

STYLE = {
    "font.family": "DejaVu Sans",
    "mathtext.fontset": "dejavusans",
    "font.size": 9,
    "legend.fontsize": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "figure.dpi": 110,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,
    "figure.facecolor": "white",
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.edgecolor": "#444444",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.6,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 5,
}


def use_style() -> None:
    """Set matplotlib's parameters to the project's style; `figure` does so itself."""
    plt.rcParams.update(STYLE)


def figure(
    rows: int = 1, cols: int = 1, *, width: float = WIDE, height: float = 2.4, **subplots
) -> tuple[Figure, np.ndarray]:
    """Return a styled figure of ``width`` x ``height`` inches and its axes, (rows, cols)."""
    use_style()
    fig = plt.figure(figsize=(width, height), layout="constrained")
    # pyplot forgets it: a notebook shows it once, as its cell's value, and its memory is freed.
    plt.close(fig)
    return fig, fig.subplots(rows, cols, squeeze=False, **subplots)


def colour(features: str) -> str:
    """Return the hex colour of a feature set in letters ("E", "K", "E+K+D").

    Sets not listed share the colour of their size. Raises ValueError for an unknown letter.
    """
    letters = features.split("+")
    if unknown := [x for x in letters if x not in NAMES]:
        raise ValueError(
            f"unknown feature {unknown[0]!r} in {features!r}: known letters are {', '.join(NAMES)}"
        )
    return COLOURS.get(features) or COLOURS["+".join("EKDS"[: len(letters)])]


def contrast(fill) -> str:
    """Return black or white, whichever reads better on a colour (WCAG relative luminance)."""
    rgb = np.asarray(to_rgb(fill))
    linear = np.where(rgb <= 0.03928, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return "black" if linear @ [0.2126, 0.7152, 0.0722] > 0.179 else "white"


def save_figure(
    fig: Figure, name: str, data: pd.DataFrame, provenance: Mapping, folder: Path | None = None
) -> dict[str, Path]:
    """Write NAME.png, .pdf, .csv (``data``: the numbers drawn) and .json; return their paths by suffix.

    The JSON holds ``provenance`` and, as "alt", what the image shows. ``folder`` defaults to the figures
    of the provenance's profile. Everything is rendered before the first file is touched. Raises
    ValueError for a name that is not lower-case letters, digits and underscores.
    """
    png, pdf = io.BytesIO(), io.BytesIO()
    fig.savefig(png, format="png", metadata={"Software": None})
    fig.savefig(pdf, format="pdf", metadata={"CreationDate": None})
    images = {"png": png.getvalue(), "pdf": pdf.getvalue()}
    record = dict(provenance) | {"alt": describe(fig)}
    return write_all(name, images | numbers(data, record), record, folder)


def save_table(
    table: pd.DataFrame,
    name: str,
    provenance: Mapping,
    folder: Path | None = None,
    *,
    decimals: int = 1,
) -> Styler:
    """Write a table as NAME.csv and NAME.json; return it styled, for display."""
    heads = ", ".join(map(str, table.columns))
    record = dict(provenance) | {"alt": f"Table of {len(table)} rows with the columns {heads}."}
    write_all(name, numbers(table, record), record, folder)
    return show_table(table, decimals).set_uuid(name)  # a fixed id: the notebook repeats


def show_table(table: pd.DataFrame, decimals: int = 1) -> Styler:
    """Return a table styled for reading: text left, numbers right, no index, no NaN.

    Columns named "paper ..." are grey, verdicts have their colours, and long texts wrap.
    """
    if any(table.index.names):
        table = table.reset_index()
    table = table.rename(columns=lambda name: str(name).replace("_", " "))
    texts = [name for name in table if not pd.api.types.is_numeric_dtype(table[name])]
    verdict = lambda word: f"color: {VERDICTS[word]}; font-weight: bold" if word in VERDICTS else ""
    styled = table.style.format(precision=decimals, na_rep="–").hide(axis="index")
    styled.set_properties(subset=texts, **{"text-align": "left", "white-space": "normal"})
    styled.map(verdict, subset=texts)
    grey = [name for name in table if name.startswith("paper")]
    styled.set_properties(subset=grey, color="#777777")
    left = [{"selector": "th", "props": "text-align: left; vertical-align: bottom"}]
    return styled.set_table_styles([*left, {"selector": "td", "props": "max-width: 36em"}])


def numbers(data: pd.DataFrame, record: Mapping) -> dict[str, bytes]:
    """Return the CSV of what was drawn, and the JSON of where it comes from."""
    if any(name is not None for name in data.index.names):
        data = data.reset_index()  # a named index carries numbers too
    csv = data.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    return {"csv": csv.encode(), "json": (as_json(record) + "\n").encode()}


def write_all(
    name: str, contents: Mapping[str, bytes], record: Mapping, folder: Path | None
) -> dict[str, Path]:
    """Write NAME.suffix for each content, each file whole or not at all; return the paths."""
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise ValueError(f"figure name {name!r}: use lower-case letters, digits, underscores only")
    if folder is None:
        profile = record.get("parameters", {}).get("profile")
        if not profile:
            raise ValueError(f"{name}: the provenance names no profile; pass folder=...")
        folder = paths.figures_dir() / profile
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, content in contents.items():
        part = folder / f".{name}.{suffix}.{os.getpid()}.part"
        try:
            part.write_bytes(content)
            os.replace(part, folder / f"{name}.{suffix}")
        finally:
            part.unlink(missing_ok=True)
    return {suffix: folder / f"{name}.{suffix}" for suffix in contents}


def describe(fig: Figure) -> str:
    """Return a figure's alternative text: its label, else the texts of its titles, axes and key."""
    if fig.get_label():
        return fig.get_label()
    axes = fig.axes
    said = lambda texts: list(dict.fromkeys(" ".join(t.split()) for t in texts if t.strip()))
    titles = said(ax.get_title("left") or ax.get_title() for ax in axes)
    across, up = said(ax.get_xlabel() for ax in axes), said(ax.get_ylabel() for ax in axes)
    key = said(
        text.get_text()
        for legend in [*fig.legends, *filter(None, map(Axes.get_legend, axes))]
        for text in legend.get_texts()
    )
    named = lambda head, texts: (
        f"{head}: {'; '.join(texts[:8])}{' and more' * (len(texts) > 8)}." * bool(texts)
    )
    panels = f"Plot of {len(axes)} panel{'s' * (len(axes) != 1)}."
    parts = [
        panels,
        named("Titles", titles),
        named("Vertical", up),
        named("Horizontal", across),
        named("Key", key),
    ]
    return " ".join(filter(None, parts))


def photographs(fig: Figure) -> Image:
    """Return a figure of photographs for a notebook's output, as JPEG: a fifth of the PNG."""
    fig.savefig(file := io.BytesIO(), format="jpeg", dpi=fig.dpi, pil_kwargs={"quality": 72})
    return Image(data=file.getvalue(), format="jpeg")


def compact(fig: Figure) -> Image:
    """Return a tall drawing for a notebook's output, as PNG of 64 colours: a third of the size."""
    fig.savefig(file := io.BytesIO(), format="png", dpi=fig.dpi)
    colours, dither = Picture.Quantize.MAXCOVERAGE, Picture.Dither.NONE
    few = Picture.open(file).convert("RGB").quantize(64, colours, dither=dither)
    few.save(file := io.BytesIO(), "png", optimize=True)
    return Image(data=file.getvalue(), format="png")

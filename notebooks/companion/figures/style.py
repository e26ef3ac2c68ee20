"""The one plotting style, and how a figure or a table is written: PNG, PDF, its numbers as CSV, its
provenance as JSON.

The drawings are in `plots`, `grids` and `diagram`; no other module imports matplotlib. Writing is
atomic (a file is whole or absent), and a second run writes the same PNG, PDF and CSV byte for byte;
the JSON holds times.
"""

import io
import json
import os
import platform
import re
import subprocess
import textwrap
import time
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path, PurePath

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Image
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image as Picture

from companion import paths

COLUMN, WIDE = 3.3, 6.2  # widths in inches: one column of a page, and two
MOST = 50  # rows of a table that are drawn

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
    """Set matplotlib's rcParams to the project's style; `figure` does so itself."""
    plt.rcParams.update(STYLE)


def figure(
    rows: int = 1, cols: int = 1, *, width: float = WIDE, height: float = 2.4, **subplots
) -> tuple[Figure, np.ndarray]:
    """A styled figure of `width` x `height` inches and its axes, (rows, cols); `subplots` as in
    `Figure.subplots`.
    """
    use_style()
    fig = plt.figure(figsize=(width, height), layout="constrained")
    plt.close(
        fig
        # pyplot forgets it: a notebook shows it once, as its cell's value, and its memory is freed
        # with
        # it
    )
    return fig, fig.subplots(rows, cols, squeeze=False, **subplots)


def colour(features: str) -> str:
    """Hex colour of a feature set in letters ("E", "K", "E+K+D"); sets not listed share the colour
    of their size.
    """
    letters = features.split("+")
    if unknown := [x for x in letters if x not in NAMES]:
        raise ValueError(
            f"unknown feature {unknown[0]!r} in {features!r}: known letters are {', '.join(NAMES)}"
        )
    return COLOURS.get(features) or COLOURS["+".join("EKDS"[: len(letters)])]


def contrast(fill) -> str:
    """Black or white, whichever reads better on the colour `fill` (WCAG relative luminance)."""
    rgb = np.asarray(to_rgb(fill))
    linear = np.where(rgb <= 0.03928, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return "black" if linear @ [0.2126, 0.7152, 0.0722] > 0.179 else "white"


def provenance(
    notebook: str,
    parameters: Mapping,
    *,
    seed: int,
    stores: Iterable = (),
    datasets: Iterable = (),
    started: float | None = None,
) -> dict:
    """Where a figure comes from, as a dict that JSON can hold.

    `stores` are store keys or opened rows (`.key`), `datasets` are `datasets.Images`, `started` is
    `time.time()` at the notebook's start. "dirty" tells whether the working tree, figures apart,
    differs from the commit; commit and dirty are None outside a git checkout.
    """
    import torch  # here, so that plotting alone does not wait for it

    def known(d) -> dict:
        return {
            "name": d.name,
            "split": d.split,
            "n": len(d),
            "fingerprint": d.fingerprint,
            "note": d.note,
        }

    packages = ("torch", "timm", "numpy", "scikit-learn", "matplotlib", "fungi_core")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    record = {
        "notebook": notebook,
        "parameters": dict(parameters),
        "seed": seed,
        "stores": [getattr(s, "key", s) for s in stores],
        "datasets": [known(d) for d in datasets],
        **_git(),
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in packages},
        "device": {"cpu": cpu(), "cores": cores, "cuda": cuda},
        "wall_seconds": None if started is None else round(time.time() - started, 1),
    }
    return json.loads(_json(record))


def save_figure(
    fig: Figure,
    name: str,
    data: pd.DataFrame,
    provenance: Mapping,
    folder: Path | str | None = None,
) -> dict[str, Path]:
    """Write NAME.png, .pdf, .csv (`data`: the numbers drawn) and .json, and return their paths by
    suffix. The JSON holds `provenance` and, as "alt", what the image shows.

    `folder` defaults to `paths.figures_dir()` / the profile among the provenance's parameters.
    `name` is lower-case letters, digits and underscores. Everything is rendered before the first
    file is touched.
    """
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise ValueError(
            f"figure name {name!r}: use lower-case letters, digits and underscores only"
        )
    png, pdf = io.BytesIO(), io.BytesIO()
    fig.savefig(png, format="png", metadata={"Software": None})
    fig.savefig(pdf, format="pdf", metadata={"CreationDate": None})
    if any(n is not None for n in data.index.names):
        data = data.reset_index()  # a named index carries numbers too
    csv = data.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    text = {
        "csv": csv.encode(),
        "json": (_json(dict(provenance) | {"alt": describe(fig)}) + "\n").encode(),
    }
    contents = {"png": png.getvalue(), "pdf": pdf.getvalue()} | text
    folder = Path(folder) if folder is not None else _profile_folder(name, provenance)
    folder.mkdir(parents=True, exist_ok=True)
    return {
        suffix: _write(folder / f"{name}.{suffix}", content) for suffix, content in contents.items()
    }


def describe(fig: Figure) -> str:
    """Alternative text of a figure, for those who cannot see it: its label where a drawing has set
    one (`fig.set_label`), else the texts of its titles, axes and key.
    """
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
    """A figure of photographs for a notebook's output, as JPEG: a fifth of the PNG that would be
    kept in it.
    """
    fig.savefig(file := io.BytesIO(), format="jpeg", dpi=fig.dpi, pil_kwargs={"quality": 72})
    return Image(data=file.getvalue(), format="jpeg")


def compact(fig: Figure) -> Image:
    """A tall drawing for a notebook's output, as PNG of 64 colours: a third of what would be kept
    in it.
    """
    fig.savefig(file := io.BytesIO(), format="png", dpi=fig.dpi)
    few = (
        Picture.open(file)
        .convert("RGB")
        .quantize(64, Picture.Quantize.MAXCOVERAGE, dither=Picture.Dither.NONE)
    )
    few.save(file := io.BytesIO(), "png", optimize=True)
    return Image(data=file.getvalue(), format="png")


def save_table(
    table: pd.DataFrame,
    name: str,
    provenance: Mapping,
    folder: Path | str | None = None,
    *,
    decimals: int = 1,
) -> "pd.io.formats.style.Styler":
    """Write a table as `save_figure` writes a figure; returns it styled, for display. Missing cells
    read as a dash.
    """
    save_figure(table_figure(table, decimals=decimals), name, table, provenance, folder)
    styled = table.style.format(precision=decimals, na_rep="–").set_uuid(
        name
    )  # a fixed id: the notebook repeats
    return styled if any(table.index.names) else styled.hide(axis="index")


def table_figure(table: pd.DataFrame, *, decimals: int = 1) -> Figure:
    """A table drawn as text between three rules, as wide as its contents need; columns named
    "paper..." are grey.

    Long texts are wrapped; of more than `MOST` rows the first are drawn, and a last line counts
    those in the CSV alone.
    """
    if table.columns.nlevels > 1 or table.empty:
        found = f"{len(table)} rows, {table.columns.nlevels} levels"
        raise ValueError(f"a table needs rows and one level of column names; this one has {found}")
    table = table.reset_index() if any(table.index.names) else table
    cells = table.map(lambda v: _cell(v, decimals)).astype(str)
    said = f"Table of {len(table)} rows with the columns {', '.join(map(str, table.columns))}."
    if rest := max(0, len(cells) - MOST):
        cells = cells.head(MOST)
    cells = cells.map(lambda text: textwrap.fill(text, 44))
    heads = [
        textwrap.fill(
            str(c).replace("_", " "),
            max(cells.iloc[:, j].str.len().max(), 9),
            break_long_words=False,
        )
        for j, c in enumerate(table.columns)
    ]
    fig, [[ax]] = figure(width=1, height=1)
    fig.set_label(said)
    em = STYLE["font.size"] / 72  # inches: one font size

    def inches(text: str, **font) -> float:
        return ax.text(0, 0, text, **font).get_window_extent().width / fig.dpi

    widths = [
        max(inches(head, weight="bold"), *map(inches, set(cells.iloc[:, j]))) + 1.6 * em
        for j, head in enumerate(heads)
    ]
    ax.clear()
    lines = lambda texts: max(text.count("\n") + 1 for text in texts)
    top = 1.25 * em * lines(heads) + 0.6 * em
    rows = np.array([0.45 * em + 1.25 * em * lines(row) for row in cells.to_numpy()])
    edges = -top - np.concatenate([[0], rows.cumsum()])
    width, height = sum(widths), -edges[-1] + 1.7 * em * bool(rest)
    fig.set_layout_engine("none")
    fig.set_size_inches(width + 2 * em, height + 2 * em)
    ax.set(position=[0, 0, 1, 1], xlim=(-em, width + em), ylim=(-height - em, em))
    ax.axis("off")
    ax.hlines([0, -top, edges[-1]], 0, width, color="black", linewidth=[1, 0.6, 1])
    if rest:
        ax.text(
            0.8 * em,
            -height + 0.5 * em,
            f"and {rest} more rows in the CSV",
            color="#666666",
            style="italic",
        )
    right = 0.0
    for j, head in enumerate(heads):
        left, right = right + 0.8 * em, right + widths[j]
        numeric = pd.api.types.is_numeric_dtype(table.dtypes.iloc[j])
        x, align = (right - 0.8 * em, "right") if numeric else (left, "left")
        ink = "#666666" if str(table.columns[j]).lower().startswith("paper") else "black"
        ax.text(x, -top + 0.6 * em, head, ha=align, va="baseline", color=ink, weight="bold")
        for i, text in enumerate(cells.iloc[:, j]):
            ax.text(x, (edges[i] + edges[i + 1]) / 2, text, ha=align, va="center", color=ink)
    return fig


def _cell(value, decimals: int) -> str:
    if pd.isna(value):
        return "–"
    return (
        f"{value:.{decimals}f}".replace("-", "−")
        if isinstance(value, float | np.floating)
        else str(value)
    )


def _profile_folder(name: str, provenance: Mapping) -> Path:
    profile = provenance.get("parameters", {}).get("profile")
    if not (isinstance(profile, str) and re.fullmatch(r"[a-z0-9_]+", profile)):
        raise ValueError(
            f"cannot place {name!r}: the parameters hold profile={profile!r}; give its name or a folder"
        )
    return paths.figures_dir() / profile


def _write(path: Path, content: bytes) -> Path:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _json(record: Mapping) -> str:
    def plain(value):
        if isinstance(value, np.generic | np.ndarray):
            return value.tolist()
        if isinstance(value, PurePath):
            return str(value)
        raise TypeError(f"provenance holds a {type(value).__name__}, which JSON cannot: {value!r}")

    return json.dumps(record, indent=2, default=plain, allow_nan=False, ensure_ascii=False)


def _git() -> dict:
    command = ["git", "status", "--porcelain=v2", "--branch", "--", ".", ":!figures"]
    try:
        done = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True)
    except FileNotFoundError:  # no git on this machine
        return {"commit": None, "dirty": None}
    if done.returncode:  # no checkout: an unpacked archive or an installed package
        return {"commit": None, "dirty": None}
    head = re.search(
        r"^# branch.oid ([0-9a-f]+)$", done.stdout, re.MULTILINE
    )  # "(initial)" before the first commit
    return {
        "commit": head and head[1],
        "dirty": any(not line.startswith("#") for line in done.stdout.splitlines()),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    model = (
        re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if info.exists()
        else None
    )
    return model[1] if model else platform.processor() or platform.machine()

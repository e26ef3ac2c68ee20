"""The scoreboard's figures: our differences beside the paper's, coloured by verdict."""

import textwrap

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from companion.figures import style
from companion.figures.panels import DASHED, PAPER, key, mark, note
from companion.figures.style import COLUMN, INK, PALE, SMALL, figure

SHADE = "#F1F1F1"


def scoreboard(df: pd.DataFrame) -> Figure:
    """Draw every claim in a row, grouped by verdict, disagreements first: ours (filled, with its
    interval), the paper's (open).

    `df` has item ("Table 2"), claim (a few words), paper, value, low, high (points), verdict (of
    `VERDICTS`), expected ("+", "-" or "": the side of zero that the claim predicts, shaded). Raises
    ValueError for another verdict.
    """
    order = df["verdict"].map(list(style.VERDICTS).index)
    names, rows = [], []  # a verdict's heading is a row without marks
    for verdict, part in df.iloc[order.argsort(kind="stable")].groupby("verdict", sort=False):
        claims = part["item"] + ": " + part["claim"]
        names += [f"{verdict} ({len(part)})", *(textwrap.fill(claim, 64) for claim in claims)]
        rows += [None, *part.itertuples()]
    tall = np.array([max(1, 0.5 * len(name.splitlines())) for name in names])  # two lines: 1
    fig, [[ax]] = figure(height=0.7 + 0.32 * tall.sum())
    numbers = df[["paper", "value", "low", "high"]].to_numpy(float)
    left, right = min(0, np.nanmin(numbers)) - 1, max(0, np.nanmax(numbers)) + 1
    places = tall.cumsum() - (tall + 1) / 2  # middles; those of equal rows are 0, 1, 2 ...
    for y, half, r in zip(places, tall / 2, rows, strict=True):
        if r is None:
            continue
        ink = style.VERDICTS[r.verdict]
        if side := {"+": (0, right), "-": (left, 0)}.get(r.expected):
            ax.fill_betweenx([y - half, y + half], *side, color=SHADE, linewidth=0, zorder=0)
        ax.plot([r.paper, r.value], [y, y], color="#BBBBBB", linewidth=1, zorder=1)
        ax.plot(r.paper, y, color=ink, zorder=3, **PAPER)
        mark(ax, r.value, y, ink, x_interval=(r.low, r.high), zorder=4)
    ax.set(yticks=places, yticklabels=names, ylim=(tall.sum() - 0.4, -0.6))
    ax.tick_params(axis="y", length=0)
    ax.grid(False)
    for label, r in zip(ax.get_yticklabels(), rows, strict=True):
        label.set(size=SMALL, weight="bold" if r is None else "normal")
    ax.set(xlim=(left, right), xlabel="difference (points)")
    ax.axvline(0, color=INK, linewidth=0.7)
    ax.spines["left"].set_visible(False)
    shade = {"marker": "s", "markersize": 9, "color": "#DDDDDD"}
    key(fig, {"ours, 95 % interval": {}, "side that the claim predicts": shade}, "the paper's")
    return fig


def deltas(df: pd.DataFrame) -> Figure:
    """Draw the paper's difference against ours: a reproduction lies on the diagonal, the other sign
    in a grey quadrant. Both axes are linear to 2 points and logarithmic beyond.

    `df` has item ("Table 2"), claim (a few words), paper, value, low, high (points), verdict; every
    row has both numbers. Claims of which the paper's number is outside our interval are numbered,
    and named below.
    """
    df = df.sort_values("paper").assign(number="")
    apart = ~df["paper"].between(df["low"], df["high"])
    df.loc[apart, "number"] = [str(n) for n in range(1, apart.sum() + 1)]
    words = df["number"] + "  " + df["item"] + ": " + df["claim"]
    names = "\n".join(textwrap.fill(text, 106) for text in words[apart])
    fig, [[ax]] = figure(height=1.4 * COLUMN + 0.14 * names.count("\n"))
    _same_scales(ax, df)
    marks = {"disagrees": "X", "undecided": "s", "agrees": "o"}
    counts = df["verdict"].value_counts()
    for r in df.itertuples():
        look = {"marker": marks[r.verdict], "markersize": 6, "alpha": 0.8}
        mark(ax, r.paper, r.value, style.VERDICTS[r.verdict], y_interval=(r.low, r.high), **look)
        note(ax, r.number, r.paper, r.value, (6, 0))
    ax.set(xlabel="the paper's difference (points)", ylabel="our difference (points)")
    fig.supxlabel(names, x=0.01, ha="left", size=SMALL)
    looks = {
        f"{verdict} ({counts[verdict]})": {"color": style.VERDICTS[verdict], "marker": marker}
        for verdict, marker in marks.items()
        if verdict in counts
    }
    key(fig, looks)
    return fig


def _same_scales(ax: Axes, df: pd.DataFrame) -> None:
    """Give the axes of `deltas` one scale, its diagonal and its quadrants."""
    numbers = df[["value", "low", "high"]].to_numpy(float)
    end = 2 * max(df["paper"].abs().max(), np.nanmax(np.abs(numbers)))
    ticks = [x for x in (-20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20) if abs(x) < end]
    for axis in ("x", "y"):
        getattr(ax, f"set_{axis}scale")("symlog", linthresh=2, linscale=1.2)
        getattr(ax, f"set_{axis}ticks")(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    for low, high in ((-end, 0), (0, end)):
        ax.fill_between([low, high], -low, -high, color=SHADE, linewidth=0, zorder=0)
    ax.axline((0, 0), (2, 2), color=PALE, linewidth=0.8, linestyle=DASHED, zorder=1)
    ax.axhline(0, color=INK, linewidth=0.7)
    ax.axvline(0, color=INK, linewidth=0.7)
    ax.set(xlim=(1.4 * min(-0.5, df["paper"].min()), 1.6 * max(0.5, df["paper"].max())))
    ax.set(ylim=(1.4 * min(-0.5, np.nanmin(numbers)), 1.4 * max(0.5, np.nanmax(numbers))))

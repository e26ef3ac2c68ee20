"""The scoreboard's figure: our differences beside the paper's, coloured by verdict."""

import textwrap

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from companion.figures import style
from companion.figures.panels import PAPER, key, mark
from companion.figures.style import INK, SMALL, figure


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
            ax.fill_betweenx([y - half, y + half], *side, color="#F1F1F1", linewidth=0, zorder=0)
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

"""What the panels of every figure share: their layout and titles, our marks with intervals, the
paper's open marks, small notes, lists as an axis, and the key.
"""

import math
from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from companion.figures.style import COLUMN, INK, PAGE, SMALL, colour, figure

MOST_PANELS = 9  # of one figure: more cannot be read
DASHED = (0, (4, 3))
# The paper's number: an open diamond.
PAPER = {
    "marker": "D",
    "markerfacecolor": "white",
    "linestyle": "none",
    "markersize": 4.5,
    "markeredgewidth": 1.1,
}


def panels(
    titles: Sequence[str], height: float, *, width: float = COLUMN, columns: int = 3
) -> tuple[Figure, dict[str, Axes]]:
    """Return a figure with a panel for each title, `columns` in a row, and {title: axes}.

    A panel is `height` inches high and at most `width` wide. Only the first nine titles get one; a
    line in the figure says how many are left out. Raises ValueError without a title.
    """
    if not len(titles):
        raise ValueError("nothing to plot: no panels")
    drawn = list(titles)[:MOST_PANELS]
    columns = min(columns, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    fig, axes = figure(rows, columns, width=min(PAGE, width * columns), height=height * rows)
    for ax in axes.flat[len(drawn) :]:
        ax.remove()
    for ax, title in zip(axes.flat, drawn, strict=False):
        ax.set_title(title)
    say_left_out(fig, len(titles) - len(drawn))
    return fig, dict(zip(drawn, axes.flat, strict=False))


def say_left_out(fig: Figure, count: int) -> None:
    """Write below a figure how many of its panels or rows of panels are left to the CSV, if any."""
    if count:
        text = f"not drawn: {count} more, with their numbers in the CSV"
        fig.legend([], [], loc="outside lower right", title=text, title_fontsize=SMALL)


def key(fig: Figure, marks: Mapping[str, Mapping], paper: str = "") -> None:
    """Write the key of the marks above the panels: {label: what differs from a dark dot}, and the
    label of the paper's open mark, if any is drawn.
    """
    dot = {"linestyle": "none", "marker": "o", "color": INK}
    handles = [Line2D([], [], **(dot | dict(mark)), label=label) for label, mark in marks.items()]
    if paper:
        handles.append(Line2D([], [], color=INK, label=paper, **PAPER))
    spacing = {"handletextpad": 0.2, "columnspacing": 1.4, "borderpad": 0.1}
    columns = len(handles) if fig.get_figwidth() > 5 else 1
    fig.legend(handles=handles, loc="outside upper left", ncols=columns, **spacing)


def titles_of(df: pd.DataFrame, columns: tuple[str, ...], by: str = "\n") -> pd.Series:
    """Return a title for each row: the first of the columns, `by`, and the others; columns that the
    frame lacks are left out. A long name of a backbone goes on in a new line after its dot.
    """
    wrap = lambda name: name if len(name) < 28 else name.replace(".", ".\n", 1)
    have = [df[column].astype(str).map(wrap) for column in columns if column in df]
    if len(have) > 2:
        have[1:] = [have[1].str.cat(have[2:], sep=", ")]
    return have[0].str.cat(have[1:], sep=by) if have else pd.Series("", df.index)


def facets(df: pd.DataFrame, columns_of_title: tuple[str, ...], height: float, **shape):
    """Return a figure with a panel for each title, and (axes, its rows of the frame) pairs; the
    rest is as for `panels`.
    """
    titles = titles_of(df, columns_of_title)
    fig, axes = panels(list(titles.unique()), height, **shape)
    return fig, [(ax, df[titles == title]) for title, ax in axes.items()]


def rows_of_panels(
    df: pd.DataFrame, columns_of_title: tuple[str, ...], count: int, height: float, **shape
):
    """Return a figure with a row of `count` panels, `height` inches high, for each title, and
    (title, axes, its rows of the frame) triples; `shape` as for `figure`.
    """
    titles = titles_of(df, columns_of_title, ", ")
    names = list(titles.unique())
    drawn = names[: max(1, MOST_PANELS // count)]
    fig, axes = figure(len(drawn), count, height=0.75 + height * len(drawn), **shape)
    say_left_out(fig, len(names) - len(drawn))
    return fig, [(name, line, df[titles == name]) for name, line in zip(drawn, axes, strict=True)]


def mark(ax: Axes, x, y, ink: str, *, x_interval=(), y_interval=(), alpha=0.75, **look) -> None:
    """Draw our number as a filled dot, with its interval (low, high) along one of the axes."""
    bar = {"color": ink, "linewidth": 1.4, "solid_capstyle": "butt", "alpha": alpha}
    if len(x_interval):
        ax.plot(x_interval, [y, y], **bar)
    if len(y_interval):
        ax.plot([x, x], y_interval, **bar)
    ax.plot(x, y, **({"marker": "o", "color": ink, "linestyle": "none", "zorder": 3} | look))


def note(ax: Axes, text: str, x, y, offset: tuple[float, float], color: str = INK) -> None:
    """Write a small text `offset` points away from a place of the panel."""
    place = {"textcoords": "offset points", "va": "center_baseline", "annotation_clip": False}
    ax.annotate(text, (x, y), offset, size=SMALL, color=color, **place)


def list_axis(ax: Axes, names: list[str]) -> None:
    """Make the y axis a list of names, the first on top, with lines that lead the eye down."""
    ax.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.4, -0.6))
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x")


def plain_log(axis: Axis, each_decade: tuple[int, ...] = (1, 3)) -> None:
    """Mark a logarithmic axis at few numbers, written out."""
    axis.set_major_locator(LogLocator(subs=each_decade))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())


def curves_of(ax: Axes, here: pd.DataFrame, x: str) -> None:
    """Draw a line with its band for each feature set of one panel."""
    for kind, part in here.groupby("features", sort=False):
        part = part.sort_values(x)
        band = {"color": colour(kind), "alpha": 0.18, "linewidth": 0}
        ax.fill_between(part[x], part["low"], part["high"], **band)
        ax.plot(part[x], part["value"], **line_of(kind))
    ax.grid(axis="y")


def line_of(kind: str) -> dict:
    """Return the look of a feature set's line. The embedding's is dashed: its grey and a dark hue
    of the same lightness are hard to tell apart.
    """
    dashes = (0, (3, 1.5)) if kind == "E" else "-"
    return {"color": colour(kind), "marker": "o", "markersize": 3, "linestyle": dashes}

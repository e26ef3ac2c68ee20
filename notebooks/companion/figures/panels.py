"""What the panels of every figure share: their layout and titles, our marks with intervals, the
paper's open marks, small notes, lists as an axis, curves with bands, and the key.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from textwrap import wrap

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from companion import paths
from companion.figures.style import COLUMN, INK, PAGE, SMALL, colour, figure

CONDITION = ("dataset", "backbone")
MOST_PANELS = 12  # of one figure: more cannot be read
DASHED = (0, (4, 3))
# The paper's number: an open diamond.
PAPER = {
    "marker": "D",
    "markerfacecolor": "white",
    "linestyle": "none",
    "markersize": 4.5,
    "markeredgewidth": 1.1,
}


def facets(
    df: pd.DataFrame, by: Sequence[str], height: float, *, each: int = 1, columns: int = 3, **shape
) -> tuple[Figure, list[tuple[np.ndarray, pd.DataFrame]]]:
    """Return a figure with `each` panels side by side for the values of the columns `by`, and
    (panels, their rows of the frame) pairs; the values stand above the first of the panels, those
    that all groups share above the figure.

    A panel is `height` inches high. Of one panel each, `columns` groups share a row. Only twelve
    panels are drawn; a line in the figure says how many groups are left out. `shape` is as for
    `figure`. The rows have low, high and paper, NaN where the frame has none. Raises ValueError for
    a frame without rows.
    """
    varied = [name for name in by if name in df and df[name].nunique() > 1]
    shared = [name for name in by if varied and name not in varied]
    titles = titles_of(df, varied or by, "\n" if varied and each == 1 < columns else " · ")
    drawn = list(titles.unique())[: max(1, MOST_PANELS // each)]
    if not drawn:
        raise ValueError("nothing to plot: no panels")
    columns = min(columns, len(drawn)) if each == 1 else 1
    rows = math.ceil(len(drawn) / columns)
    width = min(PAGE, COLUMN * columns * each)
    size = {"width": width, "height": 0.4 + height * rows} | shape
    fig, axes = figure(rows, columns * each, **size)
    groups = axes.reshape(-1, each)
    for ax in groups[len(drawn) :].flat:
        ax.remove()
    fig.suptitle(titles_of(df, shared, " · ").iloc[0], x=0.01, ha="left")
    for title, group in zip(drawn, groups, strict=False):
        group[0].set_title(title)
    if more := titles.nunique() - len(drawn):
        text = f"not drawn: {more} more, with their numbers in the CSV"
        fig.legend([], [], loc="outside lower right", title=text, title_fontsize=SMALL)
    df = df.assign(**{name: np.nan for name in ("low", "high", "paper") if name not in df})
    return fig, [(group, df[titles == title]) for title, group in zip(drawn, groups, strict=False)]


def titles_of(df: pd.DataFrame, columns: Sequence[str], between: str) -> pd.Series:
    """Return a title for each row: its values in the columns, `between` one another, those of the
    tables in words; columns that the frame lacks are left out. Between lines long ones are cut.
    """
    have = [in_words(df[column].astype(str)) for column in columns if column in df]
    if between == "\n":
        have = [words.map(_in_lines) for words in have]
    return have[0].str.cat(have[1:], sep=between) if have else pd.Series("", df.index)


def in_words(names: pd.Series) -> pd.Series:
    """Return names of data sets, scenes and backbones as the tables call them, the setting "full"
    as "all labels", others as they are. Words may follow a name: "NAME mosaics".

    Parts of one data set, which the tables call alike, keep their names.
    """
    first = names.str.partition(" ")
    words = first[0].map(lambda name: _titles().get(name, name)) + first[1] + first[2]
    return words if words.nunique() == names.nunique() else names


def _in_lines(text: str) -> str:
    if " " in text:
        return "\n".join(wrap(text, 28))
    return text if len(text) < 28 else text.replace(".", ".\n", 1)  # a backbone's name


@cache
def _titles() -> dict[str, str]:
    tables = [paths.ROOT / "data" / f"{x}.csv" for x in ("datasets", "scenes", "backbones")]
    every = pd.concat([pd.read_csv(file) for file in tables])
    titles = dict(zip(every["name"], every["title"], strict=True))
    # Folds together are called as one of them is, without its number.
    one = [name for name in titles if name.endswith("_fold1")]
    whole = {x.removesuffix("_fold1"): titles[x].removesuffix(", fold 1") for x in one}
    return whole | titles | {"full": "all labels"}


def head(ax: Axes, text: str) -> None:
    """Write a head above a panel, below its title if it has one."""
    ax.set_title(f"{ax.get_title(loc='left')}\n{text}".strip())


def key(fig: Figure, marks: Mapping[str, Mapping], paper: str = "") -> None:
    """Write the key of the marks above the panels: {label: what differs from a dark dot}, and the
    label of the paper's open mark, if any is drawn. What stands above the figure heads it.
    """
    dot = {"linestyle": "none", "marker": "o", "color": INK}
    handles = [Line2D([], [], **(dot | dict(mark)), label=label) for label, mark in marks.items()]
    if paper:
        handles.append(Line2D([], [], color=INK, label=paper, **PAPER))
    spacing = {"handletextpad": 0.4, "columnspacing": 1.4, "borderpad": 0.1}
    columns = len(handles) if fig.get_figwidth() > 5 else 1
    heading = {"title": fig.get_suptitle(), "alignment": "left"}
    fig.suptitle("")  # it would lie on the key
    fig.legend(handles=handles, loc="outside upper left", ncols=columns, **spacing, **heading)


def mark(ax: Axes, x, y, ink: str, *, x_interval=(), y_interval=(), alpha=0.75, **look) -> None:
    """Draw our number as a filled dot, with its interval (low, high) along one of the axes."""
    bar = {"color": ink, "linewidth": 1.4, "solid_capstyle": "butt", "alpha": alpha}
    if len(x_interval):
        ax.plot(x_interval, [y, y], **bar)
    if len(y_interval):
        ax.plot([x, x], y_interval, **bar)
    ax.plot(x, y, **({"marker": "o", "color": ink, "linestyle": "none", "zorder": 3} | look))


def note(ax: Axes, text: str, x, y, offset: tuple[float, float] = (5, 0), **look) -> None:
    """Write a small text `offset` points away from a place of the panel."""
    place = {"textcoords": "offset points", "va": "center_baseline", "annotation_clip": False}
    ax.annotate(text, (x, y), offset, size=SMALL, **place | look)


def list_axis(ax: Axes, names: list[str]) -> None:
    """Make the y axis a list of names, the first on top, with lines that lead the eye down."""
    ax.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.4, -0.6))
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x")


def plain_log(axis: Axis, each_decade: tuple[int, ...] = (1, 3)) -> None:
    """Make an axis logarithmic and mark it at few numbers, written out."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=each_decade))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())


def curves_of(ax: Axes, df: pd.DataFrame, x: str, looks: Mapping, by: str = "features") -> None:
    """Draw `value` against the column `x` as a line with its band from `low` to `high`, for each
    value of the column `by` in its look, {value: options of a line}.
    """
    for name, look in looks.items():
        part = df[df[by] == name].sort_values(x)
        ax.fill_between(
            part[x], part["low"], part["high"], color=look["color"], alpha=0.15, linewidth=0
        )
        ax.plot(part[x], part["value"], **look)
    ax.grid(axis="y")


def lines_of(names: Sequence[str], inks: Sequence[str] = ()) -> dict[str, dict]:
    """Return the look of each feature set's line, or of other names in `inks`.

    The embedding's is dashed: its grey and a dark hue of the same lightness are hard to tell apart.
    """
    names = list(dict.fromkeys(names))
    inks = inks or [colour(name) for name in names]
    look = lambda name: {"linestyle": (0, (3, 1.5)) if name == "E" else "-"}
    shape = {"marker": "o", "markersize": 3}
    return {
        name: shape | look(name) | {"color": ink} for name, ink in zip(names, inks, strict=False)
    }

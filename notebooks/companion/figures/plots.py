"""The paper's figures as functions: tidy numbers in, a `Figure` out; nothing is read or written.

A tidy frame has one row for each mark, with these columns (accuracies in percent, differences in
percentage points): `dataset`, `backbone`, `setting` ("full", "5-shot"): the condition, each
optional; `features`: "E", "K", "E+K+D+S"; `value`, `low`, `high`: ours with its 95 % interval (NaN:
not run); `paper`: the published number (NaN: none). Ours are filled marks, the paper's open ones.
Matplotlib draws nothing at NaN. A column that a drawing needs and the frame lacks is a KeyError or
AttributeError with its name.
"""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from companion.figures import panels, style
from companion.figures.panels import CONDITION, DASHED, PAPER, facets, key, mark, note, plain_log
from companion.figures.style import INK, NAMES, PALE, SMALL, colour


def class_deltas(df: pd.DataFrame) -> Figure:
    """Draw Fig. 3: the accuracy of each class with one gradient minus that with the embedding,
    sorted. `df` has features ("K", "D", "S"), class, value (points).

    Each data set, backbone and setting is a row of panels, which share their y axis.
    """
    kinds = list(df["features"].unique())
    fig, parts = facets(df, (*CONDITION, "setting"), 1.3, each=len(kinds), sharey="row")
    for ax, kind in zip(parts[0][0], kinds, strict=True):
        panels.head(ax, f"{NAMES.get(kind, kind)} − embedding")
    for axes, here in parts:
        # Sorted bars leave the upper right and the lower left free: the counts go where more is.
        below = -here["value"].min() > here["value"].max()
        corner = {"x": 0.02, "y": 0.02, "ha": "left", "va": "bottom"}
        corner = corner if below else {"x": 0.98, "y": 0.99, "ha": "right", "va": "top"}
        for ax, kind in zip(axes, kinds, strict=True):
            delta = here.loc[here["features"] == kind, "value"].sort_values(ascending=False)
            width = 1 if len(delta) > 40 else 0.8  # many bars touch
            ax.bar(range(len(delta)), delta, width=width, color=colour(kind))
            ax.axhline(0, color=INK, linewidth=0.7)
            ax.spines["bottom"].set_visible(False)
            ax.set(xticks=[], xlabel=f"{len(delta)} classes")
            counts = f"{(delta > 0).sum()} better\n{(delta < 0).sum()} worse"
            ax.text(s=counts, transform=ax.transAxes, size=SMALL, **corner)
    fig.supylabel("Δ accuracy (points)")
    return fig


def accuracy_by_features(
    df: pd.DataFrame, label: str = "accuracy (%)", ours: str = "ours, 95 % interval"
) -> Figure:
    """Draw Tables 2 and 8: accuracy as gradients are added, in the frame's order, a panel for each
    data set, backbone and setting. `df` has features and value.

    `paper` is the published *gain* over the embedding, in points, drawn as an open mark that far
    above our own embedding. `label` names the y axis, `ours` our marks in the key.
    """
    kinds = list(df["features"].unique())
    outer = [name for name in ("backbone", "setting") if name in df]
    if outer:  # the data sets of one backbone and setting stand side by side
        df = df.iloc[df.groupby(outer, sort=False).ngroup().argsort(kind="stable")]
    fig, parts = facets(df, (*CONDITION, "setting"), 1.9)
    for [ax], here in parts:
        base = here.loc[here["features"] == "E", "value"].mean()  # NaN where it was not run
        ax.axhline(base, color=PALE, linewidth=0.7, linestyle=DASHED, zorder=0)
        for r in here.itertuples():
            x, ink = kinds.index(r.features), colour(r.features)
            mark(ax, x, r.value, ink, y_interval=(r.low, r.high))
            if r.features != "E":
                ax.plot(x + 0.25, base + r.paper, color=ink, **PAPER)
        ax.set_xlim(-0.5, len(kinds) - 0.4)
        _feature_ticks(ax, kinds)
        ax.margins(y=0.12)
    fig.supylabel(label)
    key(fig, {ours: {}}, _if_any(df, "our embedding + the paper's gain"))
    return fig


def _feature_ticks(ax: Axes, kinds: list[str]) -> None:
    """Name feature sets below a panel; one that continues the set before it is "+ what it adds"."""
    ticks = []
    for before, kind in zip(["", *kinds], kinds, strict=False):
        continues = before and kind.startswith(f"{before}+")
        ticks.append("+ " + kind.removeprefix(f"{before}+") if continues else kind)
    crowded = len(kinds) > 4 and max(map(len, ticks)) > 3
    ax.set_xticks(range(len(kinds)), ticks, rotation=40 * crowded)


def _if_any(df: pd.DataFrame, label: str) -> str:
    """Return the label of the paper's marks for the key, or "" where the frame has none."""
    return label if "paper" in df and df["paper"].notna().any() else ""


def variants(df: pd.DataFrame, *, against: str, interval: str = "95 % interval") -> Figure:
    """Draw Tables 3, 6, 7, 9, 15 and Figs 5, 9, 10: the paired difference of each setting from the
    one called `against`, in the frame's order, a row of panels for each data set and backbone.

    `df` has column (a column of panels each), variant, features (its colour), value (percent,
    written beside), gain, gain_low, gain_high (points; `interval` says what they are). `paper` is
    the published difference in points. A `value` of NaN is marked as not applicable.
    """
    df = df.assign(**{x: panels.in_words(df[x]) for x in ("column", "variant")})
    columns, names = list(df["column"].unique()), list(df["variant"].unique())
    wide = len(columns) not in (2, 3)  # then each has a title of its own, three in a row
    by, each, across = ((*CONDITION, "column"), 1, 3) if wide else (CONDITION, len(columns), 1)
    shape = {"columns": across, "width": style.PAGE, "sharex": False if wide else "col"}
    fig, parts = facets(df, by, 0.7 + 0.2 * len(names), each=each, sharey=True, **shape)
    for axes, here in parts:
        for ax, column in zip(axes, here["column"].unique() if wide else columns, strict=True):
            beside, rows = {"xycoords": ax.get_yaxis_transform()}, here[here["column"] == column]
            if rows.empty:
                note(ax, "not run", 0.5, len(names) / 2, (0, 0), ha="center", color=PALE, **beside)
            for r in rows.itertuples():
                y, ink = names.index(r.variant), colour(r.features)
                mark(ax, r.gain, y, ink, x_interval=(r.gain_low, r.gain_high))
                ax.plot(r.paper, y + 0.3 * (r.gain == r.gain), color=ink, **PAPER)  # below ours
                if np.isnan(r.value):
                    note(ax, "not applicable", 0.5, y, (0, 0), ha="center", color=PALE, **beside)
                else:
                    note(ax, f"{r.value:.1f}", 1, y, (2, 0), **beside)
            if len(rows):
                ax.axvline(0, color=INK, linewidth=0.7, linestyle=DASHED)
            panels.list_axis(ax, names)
            if not wide:
                panels.head(ax, column)
    fig.supxlabel(f"difference from {against} (points; right: percent)")
    key(fig, {f"ours, {interval}": {}}, _if_any(df, "the paper's difference"))
    return fig


def curves(df: pd.DataFrame, *, x: str, label: str) -> Figure:
    """Draw accuracy against the column `x`, named `label`, for each feature set, a panel for each
    data set and backbone.

    `df` has features, value and `x`; bands go from `low` to `high`, and the notebook says what they
    are.
    """
    fig, parts = facets(df, CONDITION, 2.0)
    looks = panels.lines_of(df["features"])
    for [ax], here in parts:
        panels.curves_of(ax, here, x, looks)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    fig.supxlabel(label)
    fig.supylabel("accuracy (%)")
    key(fig, looks)
    return fig


def views_and_speed(df: pd.DataFrame) -> Figure:
    """Draw Fig. 12 against views an image: accuracy, and beside it images/s with their floor as a
    dashed line, a row for each data set and backbone.

    `df` has features, views, value with low and high (percent), speed and floor (images/s).
    """
    fig, parts = facets(df, CONDITION, 2.3, each=2)
    looks, ticks = panels.lines_of(df["features"]), sorted(df["views"].unique())
    for (accuracy, speed), here in parts:
        panels.curves_of(accuracy, here, "views", looks)
        once = here.drop_duplicates("views").sort_values("views")
        speed.plot(once["views"], once["speed"], color=INK, marker="o", markersize=3)
        speed.plot(once["views"], once["floor"], color=PALE, linestyle=DASHED)
        plain_log(speed.yaxis)
        for ax in (accuracy, speed):
            plain_log(ax.xaxis)
            ax.set_xticks(ticks, ticks, size=SMALL)
            ax.set(xlabel="views an image")
        accuracy.set(ylabel="accuracy (%)")
        speed.set(ylabel="images/s")
    marks = {NAMES.get(kind, kind): look for kind, look in looks.items()}
    floor = {"color": PALE, "linestyle": DASHED, "marker": ""}
    key(fig, marks | {"floor of the speed": floor})
    return fig


def trade_off(df: pd.DataFrame) -> Figure:
    """Draw the accuracy gained over the embedding against images/s, a panel for each data set and
    backbone; points that no other beats in both are joined by a line.

    `df` has features, label (written at the point), native (open mark), speed (images/s), gain,
    gain_low, gain_high.
    """
    fig, parts = facets(df, CONDITION, 3.0, columns=2, width=style.PAGE)
    for [ax], here in parts:
        here = here.sort_values("speed", ascending=False)
        best = here[here["gain"] > here["gain"].cummax().shift(fill_value=-np.inf)]
        ax.plot(best["speed"], best["gain"], color=PALE, linewidth=0.8, zorder=0)
        for r in here.itertuples():
            ink = colour(r.features)
            look = {"alpha": 0.5, "markerfacecolor": "white" if r.native else ink}
            mark(ax, r.speed, r.gain, ink, y_interval=(r.gain_low, r.gain_high), **look)
            # The two kinds of points lie close together: one is named below, one above.
            place = (r.gain_low, (0, -6)) if r.native else (r.gain_high, (0, 6))
            note(ax, r.label, r.speed, *place, ha="center")
        ax.axhline(0, color=PALE, linewidth=0.7, linestyle=DASHED, zorder=0)
        ax.set(xlabel="images/s", ylabel="gain (points)")
        plain_log(ax.xaxis)
        ax.margins(x=0.12)
        ax.grid(axis="y")
    marks = {NAMES.get(kind, kind): {"color": colour(kind)} for kind in df["features"].unique()}
    key(fig, marks | {"views at their own size": {"markerfacecolor": "white"}})
    return fig


def by_classes(df: pd.DataFrame) -> Figure:
    """Draw the mIoU gained over the embedding against the number of classes in a scene, a panel for
    each data set and backbone.

    `df` has features, classes, images (how many), gain, gain_low, gain_high.
    """
    names = list(df["features"].unique())
    inks = dict(zip(names, (style.FUNGI, "#0072B2", "#CC79A7"), strict=False))
    fig, parts = facets(df, CONDITION, 2.6, columns=3, width=style.PAGE)
    for [ax], here in parts:
        ticks = here.drop_duplicates("classes").set_index("classes")["images"]
        for shift, (name, ink) in zip((-0.12, 0, 0.12), inks.items(), strict=False):
            part = here[here["features"] == name]
            x = [list(ticks.index).index(count) + shift for count in part["classes"]]
            ax.plot(x, part["gain"], color=ink, linewidth=0.8, alpha=0.6)
            for at, r in zip(x, part.itertuples(), strict=True):
                mark(ax, at, r.gain, ink, y_interval=(r.gain_low, r.gain_high))
        ax.axhline(0, color=INK, linewidth=0.7, linestyle=DASHED)
        labels = [
            f"{count.replace(' or more', '+')}\n({images})" for count, images in ticks.items()
        ]
        ax.set(xticks=range(len(ticks)), xticklabels=labels, xlim=(-0.5, len(ticks) - 0.5))
        ax.grid(axis="y")
    fig.supxlabel("classes in a scene (how many scenes)")
    fig.supylabel("gain over the embedding (mIoU)")
    key(fig, {name: {"color": ink} for name, ink in inks.items()})
    return fig


def throughput(df: pd.DataFrame) -> Figure:
    """Draw Table 22: the images/s of each feature (log axis) and the fraction of its floor that is
    reached.

    `df` has features, value and floor (images/s; the floor is the stock forward pass divided by the
    number of views), paper, paper_floor (images/s), and optionally backbone, low, high.
    """
    names = df["features"].map(NAMES) + " gradient"
    if "backbone" in df and df["backbone"].nunique() > 1:
        names = names + "\n" + panels.in_words(df["backbone"])
    fig, [((speed, share), rows)] = facets(df, (), 0.7 + 0.36 * len(df), each=2, sharey=True)
    tick = {"marker": "|", "markersize": 10, "markeredgewidth": 1.2, "linestyle": "none"}
    for y, r in enumerate(rows.itertuples()):
        ink = colour(r.features)
        mark(speed, r.value, y, ink, x_interval=(r.low, r.high))
        speed.plot(r.floor, y, color=INK, **tick)
        speed.plot(r.paper, y, color=ink, **PAPER)
        share.barh(y, r.value / r.floor, height=0.5, color=ink)
        share.plot(r.paper / r.paper_floor, y, color=INK, **PAPER)
        note(share, f"{r.value / r.floor:.2f}", 0, y, color=style.contrast(ink))
    share.axvline(1, color=INK, linewidth=0.7, linestyle=DASHED)
    share.set(xlabel="fraction of the floor\n(stock forward pass / views)", xlim=(0, None))
    speed.set(xlabel="images/s")
    plain_log(speed.xaxis, each_decade=(1,))
    for ax in (speed, share):
        panels.list_axis(ax, list(names))
    key(fig, {"ours": {}, "floor": tick}, "the paper's (A100, ViT-B/16)")
    return fig

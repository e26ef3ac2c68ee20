"""The paper's figures as functions: tidy numbers in, a `Figure` out; nothing is read or written.

A tidy frame has one row for each mark, with these columns (accuracies in percent, differences in
percentage points): `dataset`, `backbone`, `setting` ("full", "5-shot"): the condition, each
optional; `features`: "E", "K", "E+K+D+S"; `value`, `low`, `high`: ours with its 95 % interval (NaN:
not run); `paper`: the published number (NaN: none). Ours are filled marks, the paper's open ones.
Matplotlib draws nothing at NaN.
"""

import textwrap

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, StrMethodFormatter

from companion.figures import style
from companion.figures.panels import (
    DASHED,
    MOST_PANELS,
    PAPER,
    curves_of,
    facets,
    key,
    line_of,
    list_axis,
    mark,
    note,
    panels,
    plain_log,
    rows_of_panels,
    say_left_out,
    titles_of,
)
from companion.figures.style import COLUMN, INK, NAMES, PALE, SMALL, colour, figure

CONDITION = ("dataset", "backbone")
SHADE = "#F1F1F1"
PAIR = {"embedding": {"color": style.COLOURS["E"]}, "FUNGI": {"color": style.FUNGI}}


def class_deltas(df: pd.DataFrame) -> Figure:
    """Draw Fig. 3: the accuracy of each class with one gradient minus that with the embedding,
    sorted. `df` has features ("K", "D", "S"), class, value (points).

    Each data set, backbone and setting is a row of panels, which share their y axis.
    """
    df = _need(df, "features", "class", "value")
    kinds = list(df["features"].unique())
    fig, rows = rows_of_panels(df, (*CONDITION, "setting"), len(kinds), 1.3, sharey="row")
    for i, (title, axes, here) in enumerate(rows):
        axes[0].set_title(title)
        # Sorted bars leave the upper right and the lower left free: the counts go where more is.
        below = -here["value"].min() > here["value"].max()
        for ax, kind in zip(axes, kinds, strict=True):
            delta = np.sort(here.loc[here["features"] == kind, "value"].to_numpy())[::-1]
            width = 1 if len(delta) > 40 else 0.8  # many bars touch
            ax.bar(range(len(delta)), delta, width=width, color=colour(kind))
            ax.axhline(0, color=INK, linewidth=0.7)
            ax.spines["bottom"].set_visible(False)
            ax.set(xticks=[], xlabel=f"{len(delta)} classes" if len(delta) else "not run")
            if i == 0:
                head = f"{NAMES.get(kind, kind)} − embedding"
                ax.set_title(f"{title}\n{head}" if ax is axes[0] else head)
            counts = f"{(delta > 0).sum()} better\n{(delta < 0).sum()} worse"
            x, y, ha, va = (0.02, 0.02, "left", "bottom") if below else (0.98, 0.99, "right", "top")
            ax.text(x, y, counts, transform=ax.transAxes, ha=ha, va=va, size=SMALL)
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
    df = _need(df, "features", "value")
    kinds = list(df["features"].unique())
    outer = [name for name in ("backbone", "setting") if name in df]
    if outer:  # the data sets of one backbone and setting stand side by side
        df = df.iloc[df.groupby(outer, sort=False).ngroup().argsort(kind="stable")]
    fig, parts = facets(df, (*CONDITION, "setting"), 1.9)
    for ax, here in parts:
        base = here.loc[here["features"] == "E", "value"].mean()  # NaN where it was not run
        ax.axhline(base, color=PALE, linewidth=0.7, linestyle=DASHED, zorder=0)
        for r in here.itertuples():
            x, ink = kinds.index(r.features), colour(r.features)
            mark(ax, x, r.value, ink, y_interval=(r.low, r.high))
            if r.features != "E":
                ax.plot(x + 0.25, base + r.paper, color=ink, **PAPER)
        if here["value"].isna().all():
            ax.text(0.5, 0.5, "not run", transform=ax.transAxes, ha="center", color=PALE)
            ax.set_yticks([])
        ax.set_xlim(-0.5, len(kinds) - 0.4)
        _feature_ticks(ax, kinds)
        ax.margins(y=0.12)
    fig.supylabel(label)
    paper = "our embedding + the paper's gain" if df["paper"].notna().any() else ""
    key(fig, {ours: {}}, paper)
    return fig


def variants(df: pd.DataFrame, *, against: str, interval: str = "95 % interval") -> Figure:
    """Draw Tables 6, 9, 15 and Fig. 10: the paired difference of each setting from the one called
    `against`, in the frame's order, a row of panels for each data set and backbone.

    `df` has column (a column of panels each), variant, features (its colour), value (percent,
    written beside), gain, gain_low, gain_high (points; `interval` says what they are). `paper` is
    the published difference in points. A `value` of NaN is marked as not applicable.
    """
    df = _need(df, "column", "variant", "features", "value", "gain", "gain_low", "gain_high")
    columns, names = list(df["column"].unique()), list(df["variant"].unique())
    width = min(style.PAGE, COLUMN * (0.55 + 0.75 * len(columns)))
    shape = {"width": width, "sharex": "col", "sharey": True}
    fig, rows = rows_of_panels(df, CONDITION, len(columns), 0.4 + 0.2 * len(names), **shape)
    for title, axes, here in rows:
        for ax, column in zip(axes, columns, strict=True):
            beside = {
                "transform": ax.get_yaxis_transform(),
                "va": "center_baseline",
                "size": SMALL,
            }
            for r in here[here["column"] == column].itertuples():
                y, ink = names.index(r.variant), colour(r.features)
                mark(ax, r.gain, y, ink, x_interval=(r.gain_low, r.gain_high))
                ax.plot(r.paper, y + 0.3, color=ink, **PAPER)
                if np.isnan(r.value):
                    ax.text(0.5, y, "not applicable", ha="center", color=PALE, **beside)
                else:
                    ax.text(1.02, y, f"{r.value:.1f}", color=INK, **beside)
            ax.axvline(0, color=INK, linewidth=0.7, linestyle=DASHED)
            list_axis(ax, names)
            ax.set_title(column)
        if title:
            axes[0].set_title(f"{title}\n{columns[0]}")
    fig.supxlabel(f"difference from {against} (points; right: accuracy in %)")
    paper = "the paper's difference" if df["paper"].notna().any() else ""
    key(fig, {f"ours, {interval}": {}}, paper)
    return fig


def curves(df: pd.DataFrame, *, x: str, label: str) -> Figure:
    """Draw accuracy against the column `x`, named `label`, for each feature set, a panel for each
    data set and backbone.

    `df` has features, value and `x`; bands go from `low` to `high`, and the notebook says what they
    are.
    """
    df = _need(df, x, "features", "value")
    fig, parts = facets(df, CONDITION, 2.1)
    for ax, here in parts:
        curves_of(ax, here, x)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    fig.supxlabel(label)
    fig.supylabel("accuracy (%)")
    key(fig, {kind: line_of(kind) for kind in df["features"].unique()})
    return fig


def views_and_speed(df: pd.DataFrame) -> Figure:
    """Draw Fig. 12 against views an image: accuracy (a panel for each data set and backbone) and,
    last, images/s of each backbone with its floor as a dashed line.

    `df` has features, views, value with low and high (percent), speed and floor (images/s).
    """
    df = _need(df, "features", "views", "value", "speed", "floor")
    titles = titles_of(df, CONDITION)
    names, last = list(titles.unique()), "speed\n(dashed: floor)"
    fig, axes = panels([*names[: MOST_PANELS - 1], last], 2.5, width=2.5)
    say_left_out(fig, max(0, len(names) - MOST_PANELS + 1))
    speed = axes.pop(last)
    for title, ax in axes.items():
        curves_of(ax, df[titles == title], "views")
        ax.set_ylabel("accuracy (%)")
    backbones = df["backbone"] if "backbone" in df else pd.Series("", df.index)
    for name in backbones.unique():
        part = df[backbones == name].drop_duplicates("views").sort_values("views")
        speed.plot(part["views"], part["speed"], color=INK, marker="o", markersize=3)
        speed.plot(part["views"], part["floor"], color=PALE, linestyle=DASHED)
        if backbones.nunique() > 1:
            note(speed, name, part["views"].iloc[0], part["speed"].iloc[0], (5, 3))
    speed.set(yscale="log", ylabel="images/s")
    plain_log(speed.yaxis)
    ticks = sorted(df["views"].unique())
    for ax in (*axes.values(), speed):
        ax.set(xlabel="views an image", xscale="log")
        ax.set_xticks(ticks, [str(tick) for tick in ticks], size=SMALL)
        ax.xaxis.set_minor_locator(NullLocator())
    key(fig, {NAMES.get(kind, kind): line_of(kind) for kind in df["features"].unique()})
    return fig


def trade_off(df: pd.DataFrame) -> Figure:
    """Draw the accuracy gained over the embedding against images/s, a panel for each data set and
    backbone; points that no other beats in both are joined by a line.

    `df` has features, label (written at the point), native (open mark), speed (images/s), gain,
    gain_low, gain_high.
    """
    df = _need(df, "features", "label", "native", "speed", "gain", "gain_low", "gain_high")
    fig, parts = facets(df, CONDITION, 3.4, width=1.35 * COLUMN, columns=2)
    for ax, here in parts:
        here = here.sort_values("speed", ascending=False)
        best = here[here["gain"] > here["gain"].cummax().shift(fill_value=-np.inf)]
        ax.plot(best["speed"], best["gain"], color=PALE, linewidth=0.8, zorder=0)
        for r in here.itertuples():
            ink = colour(r.features)
            look = {"alpha": 0.5, "markerfacecolor": "white" if r.native else ink}
            mark(ax, r.speed, r.gain, ink, y_interval=(r.gain_low, r.gain_high), **look)
            # The two kinds of SimCLR points lie close together: one is named below, one above.
            note(ax, r.label, r.speed, r.gain, (3, -8 if r.native else 8), color=ink)
        ax.axhline(0, color=PALE, linewidth=0.7, linestyle=DASHED, zorder=0)
        ax.set(xscale="log", xlabel="images/s", ylabel="gain (points)")
        plain_log(ax.xaxis)
        ax.margins(x=0.12)
        ax.grid(axis="y")
    marks = {NAMES.get(kind, kind): {"color": colour(kind)} for kind in df["features"].unique()}
    key(fig, marks | {"views at their own size": {"markerfacecolor": "white"}})
    return fig


def projections(df: pd.DataFrame) -> Figure:
    """Draw ways to project the same gradients: accuracy, distortion of distances (percent), seconds
    for 1,000 images, a row of panels for each data set and backbone.

    `df` has kind ("exact" first), size, value with low and high, distortion, seconds. The accuracy
    of the exact similarity is the dashed line.
    """
    df = _need(df, "kind", "size", "value", "distortion", "seconds")
    df = df.assign(name=df["kind"] + (", " + df["size"]).where(df["size"] != "", ""))
    names = list(df["name"].unique())
    inks = dict(zip(df["kind"].unique(), (INK, "#0072B2", "#D55E00", "#009E73"), strict=False))
    fig, rows = rows_of_panels(df, CONDITION, 3, 0.65 + 0.19 * len(names), sharey=True)
    for title, (accuracy, distortion, seconds), here in rows:
        exact = here.loc[here["kind"] == "exact", "value"].iloc[0]
        accuracy.axvline(exact, color=INK, linewidth=0.8, linestyle=DASHED, zorder=0)
        for r in here.itertuples():
            y, ink = names.index(r.name), inks[r.kind]
            mark(accuracy, r.value, y, ink, x_interval=(r.low, r.high))
            distortion.barh(y, r.distortion, height=0.55, color=ink)
            note(distortion, f"{r.distortion:.1f}", r.distortion, y, (3, 0))
            mark(seconds, r.seconds, y, ink)
            note(seconds, f"{r.seconds:.2g}", r.seconds, y, (5, 0))
        seconds.set(xscale="log")
        seconds.xaxis.set_minor_locator(NullLocator())
        for ax in (accuracy, distortion, seconds):
            list_axis(ax, names)
            ax.margins(x=0.25)
        accuracy.set(title=title, xlabel="accuracy (%)")
        distortion.set(xlabel="error of distances (%)")
        seconds.set(xlabel="seconds for 1,000 images")
    return fig


def backbone_bars(df: pd.DataFrame) -> Figure:
    """Draw Figs 5 and 11: the embedding ("E") against style.FUNGI (any other `features`) for each
    backbone, a column of panels for each setting.

    Rows without `value` fill the lower panels: `paper`, the published numbers of their backbones.
    """
    df = _need(df, "backbone", "features", "value")
    df = df if "setting" in df else df.assign(setting="")
    many = "dataset" in df and df["dataset"].nunique() > 1
    df = df.assign(label=df["backbone"] + (" · " + df["dataset"] if many else ""))
    ours = df["value"].notna()
    parts = {who: df[rows] for who, rows in {"ours": ours, "paper": ~ours}.items() if rows.any()}
    settings = list(df["setting"].unique())
    counts = [part["label"].nunique() for part in parts.values()]
    height = 0.9 + 0.24 * sum(counts) + 0.35 * len(parts)
    shape = {"sharey": "row", "height_ratios": [count + 0.8 for count in counts]}
    fig, axes = figure(len(parts), len(settings), height=height, **shape)
    for line, (who, part) in zip(axes, parts.items(), strict=True):
        names = list(part["label"].unique())
        for ax, setting in zip(line, settings, strict=True):
            for r in part[part["setting"] == setting].itertuples():
                ink, shift = _pair(r.features, 0.13)  # so that neither mark hides the other
                y = names.index(r.label) + shift
                mark(ax, r.value, y, ink, x_interval=(r.low, r.high))
                ax.plot(r.paper, y, color=ink, **PAPER)
            list_axis(ax, names)
            ax.set_title(", ".join(filter(None, [who, setting])))
    fig.supxlabel("accuracy (%)")
    key(fig, PAIR, "the paper's" if "paper" in parts else "")
    return fig


def miou_by_memory(df: pd.DataFrame) -> Figure:
    """Draw Tables 3 and 7: the mIoU of embedding and FUNGI by memory size, and beside it their
    paired difference, a row of panels for each data set and backbone.

    `df` has memory (patches), share (of the training patches), features ("E" or any other, FUNGI),
    value, low, high, gain, gain_low, gain_high. `paper` is the published gain in points.
    """
    df = _need(df, "memory", "share", "features", "value", "gain", "gain_low", "gain_high")
    fig, rows = rows_of_panels(df, CONDITION, 2, 1.9, width_ratios=[1.25, 1])
    for title, (level, gains), here in rows:
        shares = here.groupby("memory")["share"].first()  # sorted by memory
        sizes = list(shares.index)
        for kind, part in here.sort_values("memory").groupby("features", sort=False):
            ink, shift = _pair(kind, -0.04)
            places = [sizes.index(size) + shift for size in part["memory"]]
            level.plot(places, part["value"], color=ink, linewidth=0.9)
            for x, r in zip(places, part.itertuples(), strict=True):
                mark(level, x, r.value, ink, y_interval=(r.low, r.high))
        for r in here[here["features"] != "E"].itertuples():
            x = sizes.index(r.memory)
            mark(gains, x, r.gain, style.FUNGI, y_interval=(r.gain_low, r.gain_high))
            gains.plot(x + 0.15, r.paper, color=style.FUNGI, **PAPER)
        ticks = [f"{size:,}\n({100 * share:.0f} %)" for size, share in shares.items()]
        for ax in (level, gains):
            ax.set_xticks(range(len(sizes)), ticks)
            ax.set_xlim(-0.4, len(sizes) - 0.6)
            ax.grid(axis="y")
        level.set(ylabel="mIoU (%)", title=title)
        gains.axhline(0, color=INK, linewidth=0.7)
        gains.set(ylabel="points", title="FUNGI − embedding")
    fig.supxlabel("patches in the memory\n(share of the training patches)")
    key(fig, PAIR, "the paper's gain" if df["paper"].notna().any() else "")
    return fig


def class_iou(df: pd.DataFrame) -> Figure:
    """Draw the IoU of each class with the embedding and with FUNGI, sorted by their difference, a
    panel for each data set and backbone.

    `df` has class, share (of the test pixels, percent), features ("E" or any other, FUNGI), value.
    A class that does not occur in the test images has no bar; of more than two dozen
    classes those with the largest gains and losses are drawn.
    """
    df = _need(df, "class", "share", "features", "value")
    df = df.assign(side=np.where(df["features"] == "E", "E", "FUNGI"))
    most = 24
    many = min(most, df["class"].nunique())
    fig, parts = facets(df, CONDITION, 0.7 + 0.25 * many, width=4.6, columns=2)
    for ax, here in parts:
        table = here.pivot_table("value", ["class", "share"], "side", sort=False).reset_index()
        table = table.assign(gain=table["FUNGI"] - table["E"]).sort_values("gain", ascending=False)
        if len(table) > most:
            table = pd.concat([table.head(most // 2), table.tail(most - most // 2)])
        y = np.arange(len(table))
        ax.barh(y - 0.2, table["E"], height=0.38, color=style.COLOURS["E"])
        ax.barh(y + 0.2, table["FUNGI"], height=0.38, color=style.FUNGI)
        ends = table[["E", "FUNGI"]].max(axis=1).fillna(0)
        for at, end, gain in zip(y, ends, table["gain"], strict=True):
            note(ax, f"{gain:+.1f}".replace("-", "−"), end, at, (4, 0))
        names = table["class"].str.replace("_", " ") + table["share"].map(" ({:.1f} %)".format)
        list_axis(ax, list(names))
        ax.set(xlabel="IoU (%)")
        ax.margins(x=0.12)
    key(fig, {name: {"marker": "s"} | look for name, look in PAIR.items()})
    return fig


def throughput(df: pd.DataFrame) -> Figure:
    """Draw Table 22: the images/s of each feature (log axis) and the fraction of its floor that is
    reached.

    `df` has features, value and floor (images/s; the floor is the stock forward pass divided by the
    number of views), and optionally paper and paper_floor (images/s), low, high.
    """
    df = _need(df, "features", "value", "floor")
    df = df if "paper_floor" in df else df.assign(paper_floor=np.nan)
    fig, [[speed, share]] = figure(1, 2, height=1.1 + 0.36 * len(df), sharey=True)
    tick = {"marker": "|", "markersize": 10, "markeredgewidth": 1.2, "linestyle": "none"}
    for y, r in enumerate(df.itertuples()):
        ink, reached = colour(r.features), r.value / r.floor
        mark(speed, r.value, y, ink, x_interval=(r.low, r.high))
        speed.plot(r.floor, y, color=INK, **tick)
        speed.plot(r.paper, y, color=ink, **PAPER)
        share.barh(y, reached, height=0.5, color=ink)
        share.plot(r.paper / r.paper_floor, y, color=INK, **PAPER)
        if np.isnan(reached):
            note(share, "not run", 0, y, (4, 0), color=PALE)
        else:
            note(share, f"{reached:.2f}", 0, y, (4, 0), color=style.contrast(ink))
    names = df["features"].map(lambda f: "embedding" if f == "E" else f"{NAMES.get(f, f)} gradient")
    if "backbone" in df and df["backbone"].nunique() > 1:
        names = names + "\n" + df["backbone"]
    speed.set(xscale="log", xlabel="images/s")
    plain_log(speed.xaxis, each_decade=(1,))
    share.axvline(1, color=INK, linewidth=0.7, linestyle=DASHED)
    share.set(xlabel="fraction of the floor\n(stock forward pass / views)", xlim=(0, None))
    for ax in (speed, share):
        list_axis(ax, list(names))
    paper = "the paper's (A100, ViT-B/16)" if df["paper"].notna().any() else ""
    key(fig, {"ours": {}, "floor": tick}, paper)
    return fig


def against_published(df: pd.DataFrame) -> Figure:
    """Draw ours and the published library on the same images: images/s (log axis, the ratio
    written) and peak memory.

    `df` has machine, backbone, features, value, published (images/s), ratio, memory,
    published_memory (GiB).
    """
    speeds, memories = ("value", "published", "ratio"), ("memory", "published_memory")
    df = _need(df, "machine", "features", *speeds, *memories)
    many = df["machine"].nunique() > 1
    names = df["features"].map(NAMES) + (", " + df["machine"] if many else "")
    fig, [[speed, memory]] = figure(1, 2, height=0.9 + 0.32 * len(df), sharey=True)
    for y, r in enumerate(df.itertuples()):
        ink = colour(r.features)
        mark(speed, r.value, y, ink, x_interval=(r.published, r.value))
        speed.plot(r.published, y, color=ink, **PAPER)
        note(speed, f"x {r.ratio:.1f}", r.value, y, (6, 0), color=ink)
        mark(memory, r.memory, y, ink)
        memory.plot(r.published_memory, y, color=ink, **PAPER)
    speed.set(xscale="log", xlabel="images/s")
    plain_log(speed.xaxis)
    speed.margins(x=0.2)
    memory.set(xlabel="peak memory of the process (GiB)", xlim=(0, None))
    for ax in (speed, memory):
        list_axis(ax, list(names))
    key(fig, {"ours": {}}, "the published library")
    return fig


def scoreboard(df: pd.DataFrame) -> Figure:
    """Draw every claim in a row, grouped by verdict, disagreements first: ours (filled, with its
    interval), the paper's (open).

    `df` has item ("Table 2"), claim (a few words), paper, value, low, high (points), verdict (of
    `VERDICTS`), and optionally expected ("+" or "-": the side of zero that the claim predicts,
    shaded). Raises ValueError for another verdict.
    """
    df = _need(df, "item", "claim", "paper", "value", "verdict")
    df = df if "expected" in df else df.assign(expected="")
    if unknown := set(df["verdict"]) - set(style.VERDICTS):
        known = ", ".join(style.VERDICTS)
        raise ValueError(f"unknown verdict {min(unknown)!r}: use one of {known}")
    df = _claim_rows(df)
    bottom = df["y"].iloc[-1] + df["height"].iloc[-1] / 2 + 0.05
    fig, [[ax]] = figure(height=bottom + 0.75)
    numbers = df[["paper", "value", "low", "high"]].to_numpy(float)
    left, right = min(0, np.nanmin(numbers)) - 1, max(0, np.nanmax(numbers)) + 1
    counts = df["verdict"].value_counts()
    for r in df.itertuples():
        top, ink = r.y - r.height / 2, style.VERDICTS[r.verdict]
        if r.first:
            head = {"ha": "right", "va": "center", "weight": "bold", "annotation_clip": False}
            at = {"xycoords": ax.get_yaxis_transform(), "textcoords": "offset points"}
            name = f"{r.verdict} ({counts[r.verdict]})"
            ax.annotate(name, (0, top - 0.13), (-4, 0), **head, **at)
        if side := {"+": (0, right), "-": (left, 0)}.get(r.expected):
            ax.fill_betweenx([top, top + r.height], *side, color=SHADE, linewidth=0, zorder=0)
        ax.plot([r.paper, r.value], [r.y, r.y], color="#BBBBBB", linewidth=1, zorder=1)
        ax.plot(r.paper, r.y, color=ink, zorder=3, **PAPER)
        mark(ax, r.value, r.y, ink, x_interval=(r.low, r.high), zorder=4)
    ax.set_yticks(df["y"], df["text"], size=SMALL)
    ax.set(ylim=(bottom, 0), xlim=(left, right), xlabel="difference (points)")
    ax.tick_params(axis="y", length=0)
    ax.axvline(0, color=INK, linewidth=0.7)
    ax.spines["left"].set_visible(False)
    shade = {"marker": "s", "markersize": 9, "color": "#DDDDDD"}
    key(fig, {"ours, 95 % interval": {}, "side that the claim predicts": shade}, "the paper's")
    return fig


def _claim_rows(df: pd.DataFrame) -> pd.DataFrame:
    """Return the scoreboard's claims by verdict, with text, height and y of each row (inches), and
    whether it is the first of its verdict: a heading goes above it.
    """
    order = df["verdict"].map(list(style.VERDICTS).index)
    df = df.iloc[order.argsort(kind="stable")]
    text = (df["item"] + ": " + df["claim"]).map(lambda claim: textwrap.fill(claim, 56))
    height = 0.2 + 0.14 * text.str.count("\n")
    first = df["verdict"] != df["verdict"].shift()
    y = (height + 0.27 * first).cumsum() - height / 2
    return df.assign(text=text, height=height, first=first, y=y)


def deltas(df: pd.DataFrame) -> Figure:
    """Draw the paper's difference against ours: a reproduction lies on the diagonal, the other sign
    in a grey quadrant. Both axes are linear to 2 points and logarithmic beyond.

    `df` has item ("Table 2"), claim (a few words), paper, value, low, high (points), verdict; rows
    without either number are left out. Claims of which the paper's number is outside our interval
    are numbered, and named below. Raises ValueError if no claim has both numbers.
    """
    df = _need(df, "item", "claim", "paper", "value", "verdict")
    df = df[df["paper"].notna() & df["value"].notna()].sort_values("paper")
    if df.empty:
        raise ValueError("nothing to plot: no claim has the paper's number and ours")
    apart = df[~df["paper"].between(df["low"], df["high"])]
    words = apart["item"] + ": " + apart["claim"]
    names = [textwrap.fill(f"{n}  {text}", 106) for n, text in enumerate(words, 1)]
    lines = sum(name.count("\n") + 1 for name in names)
    fig, [[ax]] = figure(width=style.PAGE, height=1.4 * COLUMN + 0.15 * lines)
    _same_scales(ax, df)
    marks = {"disagrees": "X", "undecided": "s", "agrees": "o"}
    for r in df.itertuples():
        look = {"marker": marks[r.verdict], "markersize": 6, "alpha": 0.8}
        mark(ax, r.paper, r.value, style.VERDICTS[r.verdict], y_interval=(r.low, r.high), **look)
    for number, r in enumerate(apart.itertuples(), 1):
        note(ax, str(number), r.paper, r.value, (6, 0), color=style.VERDICTS[r.verdict])
    ax.set(xlabel="the paper's difference (points)", ylabel="our difference (points)")
    counts = df["verdict"].value_counts()
    seen = [verdict for verdict in marks if verdict in counts]
    looks = [{"color": style.VERDICTS[verdict], "marker": marks[verdict]} for verdict in seen]
    key(fig, dict(zip([f"{verdict} ({counts[verdict]})" for verdict in seen], looks, strict=True)))
    if names:
        handles = [Line2D([], [], linestyle="none", label=name) for name in names]
        place = {"loc": "outside lower left", "handlelength": 0, "handletextpad": 0}
        fig.legend(handles=handles, fontsize=SMALL, **place)
    return fig


def _same_scales(ax: Axes, df: pd.DataFrame) -> None:
    """Give the axes of `deltas` one scale, its diagonal and its quadrants."""
    numbers = df[["value", "low", "high"]].to_numpy(float)
    end = 2 * max(df["paper"].abs().max(), np.nanmax(np.abs(numbers)))
    ax.set_xscale("symlog", linthresh=2, linscale=1.2)
    ax.set_yscale("symlog", linthresh=2, linscale=1.2)
    for low, high in ((-end, 0), (0, end)):
        other = (-low, -high)
        ax.fill_between([low, high], *other, color=SHADE, linewidth=0, zorder=0)
    ax.axline((0, 0), (2, 2), color=PALE, linewidth=0.8, linestyle=DASHED, zorder=1)
    ax.axhline(0, color=INK, linewidth=0.7)
    ax.axvline(0, color=INK, linewidth=0.7)
    for axis in (ax.xaxis, ax.yaxis):
        ticks = [x for x in (-20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20) if abs(x) < end]
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_locator(NullLocator())
    ax.set(xlim=(1.4 * min(-0.5, df["paper"].min()), 1.6 * df["paper"].max()))
    ax.set(ylim=(1.4 * min(-0.5, np.nanmin(numbers)), 1.4 * np.nanmax(numbers)))


def _need(df: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """Return the frame with low, high and paper, NaN where it has none. Raises ValueError for a
    column that it lacks, or without rows.
    """
    if missing := [c for c in columns if c not in df]:
        raise ValueError(
            f"the plot needs column {missing[0]!r}; the frame has {', '.join(map(str, df.columns))}"
        )
    if df.empty:
        raise ValueError("nothing to plot: the frame has no rows")
    return df.assign(**{c: np.nan for c in ("low", "high", "paper") if c not in df})


def _feature_ticks(ax: Axes, kinds: list[str]) -> None:
    """Name feature sets below a panel; one that continues the set before it is "+ what it adds"."""
    ticks = []
    for before, kind in zip(["", *kinds], kinds, strict=False):
        continues = before and kind.startswith(f"{before}+")
        ticks.append("+ " + kind.removeprefix(f"{before}+") if continues else kind)
    crowded = len(kinds) > 4 and max(map(len, ticks)) > 3
    ax.set_xticks(range(len(kinds)), ticks, rotation=40 * crowded)


def _pair(features: str, shift: float = 0.0) -> tuple[str, float]:
    """Return colour and shift of the embedding, or those of FUNGI, the opposite."""
    return (style.COLOURS["E"], shift) if features == "E" else (style.FUNGI, -shift)

"""Heat maps of pairs of features and grids of pictures: arrays in, a `Figure` out; nothing is read
or written.

A picture is a PIL image or an array, (H, W) or (H, W, 3), already decoded. A picture may be right
(blue frame), wrong (vermillion frame) or neither (None, no frame).
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image

from companion.figures import style
from companion.figures.panels import CONDITION, DASHED, curves_of, facets, key, lines_of
from companion.figures.style import NAMES, PAGE, SMALL, colour, figure

MASKS = (  # after Tol's muted scheme, safe for colour-blind readers
    "#88CCEE", "#DDCC77", "#AA4499", "#7A7A7A", "#EE7733", "#117733",
    "#CC6677", "#44AA99", "#332288", "#882255", "#111111", "#999933",
)  # fmt: skip


def cka_heatmaps(df: pd.DataFrame) -> Figure:
    """Draw Fig. 2, top: the linear CKA of each pair of features, a panel for each data set and
    backbone.

    `df` has a, b (letters; each pair once, the diagonal too, in the order of the features), cka.
    """
    fig, parts = facets(df, CONDITION, 2.1)
    for [ax], here in parts:
        shade = _triangle(here, "cka")
        _heatmap(ax, shade, shade, ".2f", vmin=0, vmax=1, cmap="Blues", square=True)
    _colour_bar(fig, "linear CKA")
    return fig


def pair_matrix(df: pd.DataFrame) -> Figure:
    """Draw Fig. 2, bottom: the kNN accuracy of each feature (diagonal) and pair, a panel for each
    data set and backbone. Colour is the difference from the embedding alone.

    `df` has a, b, value, and all: the accuracy of all features together, drawn as the framed cell
    in the empty corner.
    """
    fig, parts = facets(df, CONDITION, 2.1)
    drawn = []
    for [ax], here in parts:
        numbers = _triangle(here, "value")
        base = numbers.loc["E", "E"]
        numbers.iloc[0, -1] = here["all"].iloc[0]
        drawn.append((ax, numbers, numbers - base))
    look = _around_zero(max(shade.abs().max(axis=None) for *_, shade in drawn))
    frame = {"facecolor": "none", "edgecolor": "black", "linewidth": 1.2, "clip_on": False}
    for ax, numbers, shade in drawn:
        last = len(numbers) - 1
        _heatmap(ax, shade, numbers, ".1f", square=True, **look)
        ax.add_patch(Rectangle((last, 0), 1, 1, **frame))
        ax.text(last - 0.12, 0.5, "all", ha="right", va="center_baseline", size=SMALL)
    _colour_bar(fig, "points above the embedding alone")
    return fig


def _triangle(df: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return a column of pairs as the lower triangle of a matrix, the rest NaN."""
    names = df["a"].unique()
    return df.pivot(index="b", columns="a", values=column).reindex(index=names, columns=names)


def source_layers(df: pd.DataFrame) -> Figure:
    """Draw Fig. 8: the accuracy of the gradients at every linear layer, a column of panels for each
    objective. Above is a heat map of the difference from the embedding with the accuracy written
    in where there is room, below are lines.

    `df` has features, kind (which layer of a block), block (from 1), value, low, high (percent),
    base (the embedding's accuracy).
    """
    kinds, objectives = list(df["kind"].unique()), list(df["features"].unique())
    blocks = sorted(df["block"].unique())
    step = 1 if len(blocks) <= 8 else 2  # of the blocks that are named
    looks = lines_of(kinds, ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"))
    base = {"color": colour("E"), "linewidth": 1, "linestyle": DASHED}
    size = {"height": 3.5 + 0.3 * len(kinds), "height_ratios": [0.3 * len(kinds) + 0.2, 2.0]}
    fig, axes = figure(2, len(objectives), sharey="row", **size)
    shade = _around_zero((df["value"] - df["base"]).abs().max())
    for (top, bottom), name in zip(axes.T, objectives, strict=True):
        here = df[df["features"] == name]
        level = here["base"].iloc[0]
        values = here.pivot(index="kind", columns="block", values="value").loc[kinds, blocks]
        _heatmap(top, values - level, values if step == 1 else False, ".0f", **shade)
        top.set_title(f"{NAMES[name]} gradient")
        curves_of(bottom, here, "block", looks, by="kind")
        bottom.axhline(level, **base)
        bottom.set(xlabel="block", xticks=blocks[step - 1 :: step])
        top.set_xticks(top.get_xticks()[step - 1 :: step])
    axes[1, 0].set_ylabel("accuracy (%)")
    _colour_bar(fig, "points above\nthe embedding", axes[0])
    key(fig, looks | {"embedding": base | {"marker": ""}})
    return fig


def gradient_panels(
    image, matrices: Mapping[str, np.ndarray], blocks: Mapping[str, np.ndarray]
) -> Figure:
    """Draw one image, its gradient matrix for each objective (D_out, D_in + 1), and below the
    vectors that are kept.

    `matrices` and `blocks` ((d,) each, unit length) are keyed by letter; `blocks` starts with the
    embedding, "E".
    """
    fig, axes = figure(2, 1 + len(matrices), height=3.4, height_ratios=[2, 1])
    _tile(axes[0, 0], image, "image")
    for ax, (letter, matrix) in zip(axes[0, 1:], matrices.items(), strict=True):
        # A few entries are far larger than the rest.
        look = _around_zero(np.percentile(np.abs(matrix), 99)) | {"rasterized": True}
        seaborn.heatmap(matrix, ax=ax, cbar=False, xticklabels=False, yticklabels=False, **look)
        ax.set(xlabel="input unit, bias last")
        ax.set_title(f"{NAMES[letter]}, rank {np.linalg.matrix_rank(matrix)}")
    axes[0, 1].set_ylabel("output unit")
    top = max(np.abs(vector).max() for vector in blocks.values())
    for ax, (letter, vector) in zip(axes[1], blocks.items(), strict=True):
        ax.bar(range(len(vector)), vector, width=1, color=colour(letter))
        ax.spines["bottom"].set_visible(False)
        ax.set(ylim=(-top, top), xlabel=f"{len(vector)} entries", xticks=[], yticks=[])
        ax.set_title(NAMES[letter] + (", projected" if letter != "E" else ""))
        ax.margins(x=0)
    return fig


def image_grid(
    images: Sequence, titles: Sequence[str], right: Sequence[bool | None] = (), *, ncols: int
) -> Figure:
    """Draw pictures with their titles in rows of `ncols`; `right` tells which are right or wrong.
    Raises ValueError without a picture.
    """
    if not len(images):
        raise ValueError("nothing to show: no images")
    ncols = min(ncols, len(images))
    rows, wide = math.ceil(len(images) / ncols), min(1.6, PAGE / ncols)
    pixels = np.asarray(images[0]).shape
    high = wide * pixels[0] / pixels[1] + 0.14 * (1 + max(t.count("\n") for t in titles))
    fig, axes = figure(rows, ncols, width=wide * ncols, height=high * rows)
    for ax in axes.flat[len(images) :]:
        ax.remove()
    for ax, *picture in zip(axes.flat, images, titles, right or [None] * len(images), strict=False):
        _tile(ax, *picture)
    return fig


def class_colours(classes: int) -> np.ndarray:
    """Return a colour for each class, (classes, 3) in [0, 1]; beyond a dozen, two lightnesses."""
    if classes <= len(MASKS):
        return np.array([to_rgb(ink) for ink in MASKS[:classes]])
    light, dark = (np.array(seaborn.husl_palette(classes, s=0.85, l=tone)) for tone in (0.72, 0.45))
    order = np.argsort(np.arange(classes) * 0.618 % 1)  # neighbours in the list differ in hue
    return np.where(np.arange(classes)[:, None] % 2 == 0, light, dark)[order]


def painted(image, mask: np.ndarray, classes: int) -> np.ndarray:
    """Return a mask (H, W) over its image in grey as RGB in [0, 1]: borders between classes are
    dark, void (an index of `classes` or more) is the grey image.
    """
    fine = math.ceil(400 / mask.shape[1])  # small images are enlarged: a border stays a thin line
    image, mask = (np.repeat(np.repeat(x, fine, 0), fine, 1) for x in (np.asarray(image), mask))
    grey = np.asarray(Image.fromarray(image).convert("L"))[..., None] / 255
    known = (mask < classes)[..., None]
    colours = class_colours(classes)[np.where(mask < classes, mask, 0)]
    out = np.where(known, 0.78 * colours + 0.22 * grey, 0.35 + 0.65 * grey)
    border = np.zeros(mask.shape, bool)
    border[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    border[1:] |= mask[1:] != mask[:-1]
    return np.where(border[..., None], 0.08, out)


def mask_rows(rows: Sequence[Mapping], names: Sequence[str]) -> Figure:
    """Draw Fig. 7: an image, its masks from the embedding and from FUNGI, and the truth, a row for
    each image, in the same colours everywhere.

    Each of `rows` has title, image (H, W, 3) uint8, masks {title: (H, W) class indices, else void};
    `names` are the classes.
    """
    images, titles, seen = [], [], set()
    for row in rows:
        image, masks = row["image"], row["masks"].values()
        images += [image, *(painted(image, mask, len(names)) for mask in masks)]
        titles += [row["title"], *row["masks"]]
        seen |= {int(c) for mask in masks for c in np.unique(mask)}
    fig = image_grid(images, titles, ncols=1 + len(rows[0]["masks"]))
    colours = class_colours(len(names))
    inks = {names[c].replace("_", " "): colours[c] for c in sorted(seen) if c < len(names)}
    if len(inks) < len(seen):
        inks["void (not scored)"] = "#CFCFCF"
    fig.set_figheight(fig.get_figheight() + 0.25 + 0.18 * math.ceil(len(inks) / 6))
    _class_key(fig, inks)
    return fig


def neighbours(query: Mapping, found: Mapping[str, Sequence[Mapping]], **look) -> Figure:
    """Draw a picture and, a row for each feature set, as many that are nearest to it.

    `query` and each neighbour have image, title and, optionally, right, and box (left, top, side):
    a patch of the image is meant, and of a neighbour only what is around it is shown. `look` are
    options of matplotlib's imshow, for arrays that are no photographs.
    """
    count = len(next(iter(found.values())))
    side = min(1.5, (PAGE - 1.9) / count)
    lines = 1 + max(one["title"].count("\n") for some in found.values() for one in some)
    size = {"width": 2 + count * side, "height": len(found) * (side + 0.12 + 0.14 * lines) + 0.1}
    fig, axes = figure(len(found), 1 + count, width_ratios=[1.9 / side, *[1] * count], **size)
    first = fig.add_subplot(axes[0, 0].get_gridspec()[:, 0])
    tiles = [(first, query)]
    for line, (name, some) in zip(axes, found.items(), strict=True):
        line[0].remove()
        line[1].set_ylabel(name)
        tiles += zip(line[1:], some, strict=True)
    for ax, one in tiles:
        _tile(ax, one["image"], one["title"], one.get("right"), **look)
        if "box" in one:
            left, top, width = one["box"]
            for ink, line in (("white", 2.6), ("black", 1.2)):
                frame = {"facecolor": "none", "edgecolor": ink, "linewidth": line}
                ax.add_patch(Rectangle((left - 0.5, top - 0.5), width, width, **frame))
            if one is not query:  # the patch, and three and a half patches on each side
                around = 3.5 * width
                ax.set_xlim(left - around, left + width + around)
                ax.set_ylim(top + width + around, top - around)
    return fig


def image_map(
    places: np.ndarray, images: Sequence, labels: Sequence[int] = (), names: Sequence[str] = ()
) -> Figure:
    """Draw a 2-D map of images, (N, 2) places: a thumbnail wherever there is room for one, else a
    dot.

    With `labels` (N,) and the classes' `names`, each has the colour of its class; more than twelve
    share hues, and of more than sixteen no key is drawn.
    """
    fig, [[ax]] = figure(height=5.2)
    places = np.asarray(places, float)
    spread = np.ptp(places, axis=0)
    width, height, side = PAGE - 0.6, 4.4, 0.42  # inches
    inches = (places - places.min(0)) / np.where(spread > 0, spread, 1) * [width, height]
    colours = class_colours(len(names))
    inks = colours[np.asarray(labels)] if len(labels) else [style.PALE] * len(places)
    ax.scatter(*inches.T, s=14, c=inks, linewidths=0)
    taken = np.full((0, 2), np.inf)
    for i, (at, ink) in enumerate(zip(inches, inks, strict=True)):
        if (np.abs(taken - at).max(axis=1) < side).any():
            continue
        taken = np.vstack([taken, at])
        left, low = at - side / 2
        small = Image.fromarray(np.asarray(images[i])).convert("RGB").resize((96, 96))
        ax.imshow(small, extent=(left, left + side, low, low + side), zorder=2)
        frame = {"facecolor": "none", "edgecolor": ink, "linewidth": 1.6, "zorder": 3}
        ax.add_patch(Rectangle((left, low), side, side, **frame))
    ax.set(xlim=(-side / 2, width + side / 2), ylim=(-side / 2, height + side / 2), aspect="equal")
    ax.axis("off")
    if 0 < len(names) <= 16:
        _class_key(fig, dict(zip(names, colours, strict=True)))
    return fig


def _tile(ax: Axes, image, title: str = "", right: bool | None = None, **look) -> None:
    """Draw a picture without ticks, with its title and the frame of right or wrong."""
    ax.imshow(np.asarray(image), **({"cmap": "gray"} | look))
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, loc="center", size=SMALL, pad=3)
    ax.spines[:].set_visible(right is not None)
    if right is not None:
        ax.spines[:].set(linewidth=2.5, color=style.VERDICTS["agrees" if right else "disagrees"])


def _around_zero(reach: float) -> dict:
    """Return the colours of differences up to `reach` on either side of zero, which is white."""
    reach = max(0.1, reach)  # where nothing differs there is no scale
    return {"vmin": -reach, "vmax": reach, "cmap": "RdBu"}


def _heatmap(ax: Axes, shade: pd.DataFrame, numbers: pd.DataFrame | bool, fmt: str, **look) -> None:
    """Draw a heat map coloured by `shade`, empty at NaN, with `numbers` written in (False: none);
    rows and columns have the frame's names.
    """
    text = {"annot": numbers, "fmt": fmt, "annot_kws": {"size": SMALL, "va": "center_baseline"}}
    names = {"xticklabels": True, "yticklabels": True}  # all of them
    seaborn.heatmap(shade, ax=ax, linewidths=1, cbar=False, **names, **text, **look)
    ax.set(xlabel="", ylabel="")
    ax.tick_params(length=0, rotation=0)


def _colour_bar(fig: Figure, label: str, axes: Sequence[Axes] = ()) -> None:
    """Draw the heat maps' shared scale beside `axes` (default: all), at most three inches high."""
    axes = list(axes if len(axes) else fig.axes)
    look = {"shrink": min(0.9, 3 / fig.get_figheight()), "aspect": 18, "anchor": (0, 1)}
    bar = fig.colorbar(axes[0].collections[0], ax=axes, pad=0.02, label=label, **look)
    bar.outline.set_visible(False)


def _class_key(fig: Figure, inks: Mapping) -> None:
    """Write the colours of classes below a figure."""
    edge = {"edgecolor": style.INK, "linewidth": 0.5}
    handles = [Patch(facecolor=ink, label=name, **edge) for name, ink in inks.items()]
    spacing = {"ncols": 6, "handlelength": 1.2, "columnspacing": 1.2}
    fig.legend(handles=handles, loc="outside lower center", fontsize=SMALL, **spacing)

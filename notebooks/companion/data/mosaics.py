"""Scenes that differ in their number of classes alone, put together from classified images."""

from itertools import product

import numpy as np

from companion.data.images import Images
from companion.data.masks import Scenes
from fungi_core.seeds import generator

COUNTS = (1, 2, 4)  # classes of a scene
CLASSES = 20  # of the data set at most, evenly spaced


def mosaics(tiles: Images, count: int, rounds: int, size: int) -> Scenes:
    """Return scenes of 2 x 2 tiles with ``count`` classes each (1, 2 or 4), (size, size) pixels.

    Four classes of ``tiles`` (one split of a data set) at a time lend four images each to four
    scenes, ``rounds`` times: whatever the count, all scenes together hold the same images. An
    image's class covers its whole quarter. Raises ValueError where a class has too few images.
    """
    named = np.linspace(0, len(tiles.classes), min(CLASSES, len(tiles.classes)), endpoint=False)
    labels = named.astype(int)[: len(named) // 4 * 4].tolist()  # in groups of four
    chosen = {}  # {class: its images}
    for label in labels:
        own = np.flatnonzero(tiles.labels == label)
        if len(own) < 4 * rounds:
            here = f"{tiles.name} {tiles.split}: {tiles.classes[label]} has {len(own)} images"
            raise ValueError(f"{here}, {4 * rounds} are needed for {rounds} rounds")
        chosen[label] = generator("mosaic", tiles.split, label).permutation(own)
    images, masks, names, each = [], [], [], 4 // count  # tiles of a class in a scene
    for group, turn, s in product(range(len(labels) // 4), range(rounds), range(4)):
        places = generator("mosaic", tiles.split, count, group, turn, s).permutation(4)
        picture, mask = np.zeros((size, size, 3), np.uint8), np.zeros((size, size), np.uint8)
        for place, (c, t) in zip(places.tolist(), product(range(count), range(each)), strict=True):
            row, column = (x * size // 2 for x in divmod(place, 2))
            at = np.s_[row : row + size // 2, column : column + size // 2]
            value = 4 * group + s // count * count + c  # of the mask
            image = tiles[int(chosen[labels[value]][4 * turn + s % count * each + t])]
            picture[at] = np.asarray(image.resize((size // 2, size // 2)))
            mask[at] = value
        images.append(picture)
        masks.append(mask)
        names.append(f"{count} classes, group {group}, round {turn}, scene {s}")
    used = [tiles.classes[label] for label in labels]
    about = {"note": f"2 x 2 images of {tiles.name} each", "licence": tiles.licence}
    return Scenes(f"{tiles.name} mosaics", tiles.split, used, names, images, masks, **about)

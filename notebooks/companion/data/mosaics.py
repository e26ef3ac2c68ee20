"""Scenes that differ in their number of classes alone, put together from classified images."""

import numpy as np

from companion.data.images import Images
from companion.data.masks import Scenes
from fungi_core.seeds import generator

COUNTS = (1, 2, 4)  # classes of a scene
CLASSES = 20  # of the data set at most, evenly spaced
# Of four classes (rows of tiles) and four scenes: which (class, tile) a scene takes.
TAKEN = {
    1: [[(s, t) for t in range(4)] for s in range(4)],
    2: [[(c + s // 2 * 2, t + s % 2 * 2) for c in (0, 1) for t in (0, 1)] for s in range(4)],
    4: [[(c, s) for c in range(4)] for s in range(4)],
}


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
    images, masks, names = [], [], []
    for group in range(len(labels) // 4):
        for turn in range(rounds):
            for s, taken in enumerate(TAKEN[count]):
                places = generator("mosaic", tiles.split, count, group, turn, s).permutation(4)
                picture = np.zeros((size, size, 3), np.uint8)
                mask = np.zeros((size, size), np.uint8)
                for place, (c, t) in zip(places.tolist(), taken, strict=True):
                    row, column = (x * size // 2 for x in divmod(place, 2))
                    at = np.s_[row : row + size // 2, column : column + size // 2]
                    value = 4 * group + c  # of the mask
                    image = tiles[int(chosen[labels[value]][4 * turn + t])]
                    picture[at] = np.asarray(image.resize((size // 2, size // 2)))
                    mask[at] = value
                images.append(picture)
                masks.append(mask)
                names.append(f"{count} classes, group {group}, round {turn}, scene {s}")
    used = [tiles.classes[label] for label in labels]
    about = {"note": f"2 x 2 images of {tiles.name} each", "licence": tiles.licence}
    return Scenes(f"{tiles.name} mosaics", tiles.split, used, names, images, masks, **about)

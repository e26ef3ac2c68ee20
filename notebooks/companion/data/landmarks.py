"""The revisited Oxford and Paris landmarks (Radenovic et al. 2018): a source, and ground truth."""

import io
import pickle
from pathlib import Path

import numpy as np

from companion.data.images import Split
from companion.messages import one_line


def images(root: Path, train: bool, name: str) -> Split:
    """Return the database (train) or the queries (test) of ``NAME/gnd_NAME.pkl`` and ``NAME/jpg``.

    Queries are whole images, as in the published code; the official evaluation crops them to the
    building.
    """
    known = ground_truth(root / name / f"gnd_{name}.pkl")
    names = [f"jpg/{image}.jpg" for image in known["imlist" if train else "qimlist"]]
    paths = [root / name / file for file in names]
    return Split(paths, np.zeros(len(paths), np.int64), names, ["landmark"])


_ADMITTED = {  # what a pickle of lists, dicts, text, numbers and NumPy arrays names
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): lambda text, _encoding: text.encode("latin1"),  # bytes of older pickles
    ("__builtin__", "bytes"): bytes,  # an empty array's
    ("builtins", "bytes"): bytes,
}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    for _name in ("_reconstruct", "scalar"):
        _ADMITTED[_module, _name] = getattr(np._core.multiarray, _name)


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) not in _ADMITTED:
            only = "only plain lists, dicts and arrays are read"
            raise pickle.UnpicklingError(f"it names {module}.{name}; {only}")
        return _ADMITTED[module, name]


def ground_truth(file: Path) -> dict:
    """Read an official ``gnd_roxford5k.pkl`` or ``gnd_rparis6k.pkl``.

    Returns the names of images under "imlist" (database) and "qimlist" (queries), and under "gnd"
    for each query {"easy", "hard", "junk"}: int64 arrays of rows of imlist. The file is a pickle
    from the network, so only plain containers and arrays are admitted; ValueError, in one line, for
    anything else.
    """
    raw = io.BytesIO(Path(file).read_bytes())
    kinds = ("easy", "hard", "junk")
    try:
        content = _Plain(raw, encoding="latin1").load()
        names = {key: [str(name) for name in content[key]] for key in ("imlist", "qimlist")}
        rows_of = lambda query, kind: np.asarray(query[kind], np.int64).reshape(-1)
        truth = [{kind: rows_of(query, kind) for kind in kinds} for query in content["gnd"]]
    except Exception as error:  # a broken pickle raises nearly anything
        about = f"{file} is no ground truth of the revisited benchmarks"
        raise ValueError(f"{about}: {type(error).__name__}: {one_line(error)}") from error
    rows = np.concatenate([rows for q in truth for rows in q.values()] or [np.empty(0, np.int64)])
    images, queries = len(names["imlist"]), len(names["qimlist"])
    if len(truth) != queries or ((rows < 0) | (rows >= images)).any():
        raise ValueError(
            f"{file}: its lists do not fit together, or point past the images: "
            f"{len(truth)} truths, {queries} queries, {images} images"
        )
    return {**names, "gnd": truth}

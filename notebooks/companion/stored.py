"""Look after the store of features.

python -m companion.stored check | repair

``repair`` removes what ``check`` names; the next extraction recomputes its rows.
"""

import argparse
import sys
from pathlib import Path

from companion import paths
from fungi_core.store import Entry, StoreCorrupt, key, load_record


def check(root: Path, repair: bool = False) -> tuple[int, list[Path]]:
    """Read every file of the store: the number of entries, and the files that are damaged or
    foreign.

    ``repair`` removes them, and only them, under each entry's lock.
    """
    bad, files = [], sorted(root.glob("*/meta.json"))
    for file in files:
        try:
            entry = Entry(file.parent, load_record(file))
            sound = key(entry.record["meta"]) == entry.key
        except StoreCorrupt:
            sound = False
        if not sound:  # whose rows these are is not known, so neither is whether they are right
            entry = Entry(file.parent, {"n": 0, "width": 0})
        names = entry.drop_corrupt() if repair else entry.corrupt()
        bad += [entry.path / name for name in names]
        if not sound:
            bad.append(file)
            if repair:
                file.unlink()
    return len(files), bad


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m companion.stored", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("what", choices=("check", "repair"))
    parser.add_argument("--root", type=Path, help="default: FUNGI_STORE, else data/store")
    args = parser.parse_args(argv)
    root = args.root or paths.store_dir()
    if not root.is_dir():
        sys.exit(f"stored: {root} is no folder")
    count, bad = check(root, args.what == "repair")
    for file in bad:
        removed = "; removed" if args.what == "repair" else ""
        print(f"{file} is truncated, altered or foreign{removed}")
    print(f"{count} entries, {len(bad)} bad files")
    if bad and args.what == "check":
        sys.exit(1)


if __name__ == "__main__":
    main()

"""Write data/LICENCES.md: licences of data, weights and locked dependencies. ``python
data/licences.py``

Data and weights are those of the code's tables, dependencies those of requirements.lock as their
installed metadata describes them.
"""

import re
from importlib import metadata
from pathlib import Path

from companion import paths
from companion.data import datasets, masks
from fungi_core import backbones

FILE = Path(__file__).with_name("LICENCES.md")
SHORT = {  # what old classifiers and free text say, as SPDX has it
    "BSD 3-Clause License": "BSD-3-Clause",
    "bsd-3-clause": "BSD-3-Clause",
    "BSD License": "BSD",
    "MIT License": "MIT",
    "Apache Software License": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "The MIT License (MIT)": "MIT",
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache License, Version 2.0": "Apache-2.0",
}


def pins() -> dict[str, str]:
    """Locked packages: name -> version."""
    lines = (paths.ROOT / "requirements.lock").read_text().splitlines()
    found = (re.match(r"([\w.-]+)==([\w.]+)", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


def licence(package: str) -> str:
    """What the installed package says: SPDX expression, else a short text, else classifiers."""
    try:
        about = metadata.metadata(package)
    except metadata.PackageNotFoundError:
        return "not installed on this platform"
    text = " ".join((about.get("License") or "").split())
    classes = [
        c.rpartition(" :: ")[2]
        for c in about.get_all("Classifier") or []
        if c.startswith("License")
    ]
    classes = [SHORT.get(c, c) for c in classes if c != "OSI Approved"]
    free = SHORT.get(text, text) if 0 < len(text) < 60 else ""
    return (
        about.get("License-Expression")
        or free
        or " AND ".join(classes)
        or "not stated in its metadata"
    )


def table(header: str, rows) -> str:
    names = header.split(" | ")
    lines = [f"| {header} |", "|---" * len(names) + "|"]
    return "\n".join(
        lines + ["| " + " | ".join(str(x).replace("|", "/") for x in row) + " |" for row in rows]
    )


def data_and_weights() -> str:
    """The part that the code's own tables give."""
    known = [*datasets.DATASETS.values(), *masks.SETS.values()]
    sets = [
        (f"`{e.name}`", e.title, e.licence, f"{e.gb:g} GB" if e.gb else "comes with a package")
        for e in known
    ]
    weights = [
        (
            f"`{s.name}`",
            s.title,
            s.licence,
            f"{s.gb:g} GB" if s.gb else "committed, or with a package",
        )
        for s in backbones.BACKBONES.values()
    ]
    return "\n\n".join(
        [
            "## Data\n\nAs Table 20 of the paper and the sets' own pages say; \"Unknown\" is the paper's word. "
            "Nothing of it is committed but what a run draws.",
            table("name | set | licence | size", sets),
            "## Weights\n\nAs Table 21 of the paper says, and the packages that bring them.",
            table("name | model | licence | size", weights),
        ]
    )


def text() -> str:
    rows = [
        (name, version, licence(name))
        for name, version in sorted(pins().items(), key=lambda p: p[0].lower())
    ]
    own = [
        (name, found)
        for name, _, found in rows
        if re.search(r"GPL|MPL|EPL|CDDL|Proprietary", found)
    ]
    terms = ", ".join(f"{name} ({found})" for name, found in own)
    return (
        "\n\n".join(
            [
                "# Licences",
                "The code of this project: MIT (`LICENSE`). Written by `python data/licences.py` (`make licences`).",
                data_and_weights(),
                "## Dependencies\n\nThe packages of `requirements.lock`, by what their metadata states. Installed by the user, "
                f"not shipped here. Copyleft or proprietary terms: {terms or 'none'}.",
                table("package | version | licence", rows),
            ]
        )
        + "\n"
    )


if __name__ == "__main__":
    FILE.write_text(text())

"""Write data/LICENCES.md: the licences of data, weights and locked dependencies.

    python data/licences.py

Data and weights are those of the companion's tables, dependencies those of requirements.lock as
their installed metadata describes them.
"""

import re
from importlib import metadata
from pathlib import Path

from companion import paths
from companion.data import datasets, masks
from companion.encoders import table as backbones

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
    """Return the locked packages: name -> version."""
    lines = (paths.ROOT / "requirements.lock").read_text().splitlines()
    found = (re.match(r"([\w.-]+)==([\w.]+)", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


def licence(package: str) -> str:
    """Return what the package says: an SPDX expression, else a short text, else classifiers."""
    try:
        about = metadata.metadata(package)
    except metadata.PackageNotFoundError:
        return "not installed on this platform"
    text = " ".join((about.get("License") or "").split())
    free = SHORT.get(text, text) if 0 < len(text) < 60 else ""
    lines = about.get_all("Classifier") or []
    classes = [line.rpartition(" :: ")[2] for line in lines if line.startswith("License")]
    classes = " AND ".join(SHORT.get(name, name) for name in classes if name != "OSI Approved")
    return about.get("License-Expression") or free or classes or "not stated in its metadata"


def table(header: str, rows) -> str:
    """Return rows as a Markdown table."""
    lines = [f"| {header} |", "|---" * len(header.split(" | ")) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(str(cell).replace("|", "/") for cell in row) + " |")
    return "\n".join(lines)


def data_and_weights() -> str:
    """Return the part that the companion's own tables give."""
    known = [*datasets.DATASETS.values(), *masks.SETS.values()]
    rows = lambda entries, small: [
        (f"`{one.name}`", one.title, one.licence, f"{one.gb:g} GB" if one.gb else small)
        for one in entries
    ]
    sets = table("name | set | licence | size", rows(known, "comes with a package"))
    weights = rows(backbones.table().values(), "committed, or with a package")
    weights = table("name | model | licence | size", weights)
    return f"""## Data

As Table 20 of the paper and the sets' own pages say; "Unknown" is the paper's word. Nothing of it
is committed but what a run draws.

{sets}

## Weights

As Table 21 of the paper says, and the packages that bring them.

{weights}"""


def text() -> str:
    """Return the whole page."""
    locked = sorted(pins().items(), key=lambda pin: pin[0].lower())
    rows = [(name, version, licence(name)) for name, version in locked]
    own = [row for row in rows if re.search(r"GPL|MPL|EPL|CDDL|Proprietary", row[2])]
    terms = ", ".join(f"{name} ({found})" for name, _, found in own) or "none"
    return f"""# Licences

The code of this project: MIT (`LICENSE`). Written by `python data/licences.py` (`make licences`).

{data_and_weights()}

## Dependencies

The packages of `requirements.lock`, by what their metadata states. Installed by the user, not
shipped here. Copyleft or proprietary terms: {terms}.

{table("package | version | licence", rows)}
"""


if __name__ == "__main__":
    FILE.write_text(text())

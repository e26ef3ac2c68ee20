"""Cut sentences of Python's own documentation (`pydoc_data.topics` of CPython 3.11) into
pydocs.csv: chapter, sentence.

    python data/texts/make.py

The classes are seven chapters; a sentence that stands in two of them is left out. Order and split
come from a hash of the sentence: three of four are training sentences.
"""

import csv
import hashlib
import re
from pathlib import Path
from pydoc_data.topics import topics

CHAPTERS = {
    "data model": "specialnames types objects bltin-code-objects dynamic-features",
    "compound statements": "compound async context-managers",
    "simple statements": "assignment augassign import assert del raise return yield global "
    "nonlocal pass break",
    "expressions": "comparisons calls binary operator-summary subscriptions slicings booleans in "
    "power unary shifting bitwise exprlists lambda conversions atom-identifiers atom-literals "
    "attribute-references await",
    "strings": "formatstrings string-methods strings",
    "containers": "typesseq typesmapping sequence-types typesseq-mutable dict lists",
    "debugger": "debugger",
}
START, END = re.compile(r"[A-Z\"*]"), re.compile(r"(?<=[.!?:]) +(?=[A-Z\"*])")


def sentences(topic: str) -> list[str]:
    """Sentences of the prose: paragraphs of 40 letters and more, joined from their lines, without
    markup.
    """
    paragraphs = (" ".join(block.split()) for block in re.split(r"\n\s*\n", topics[topic]))
    prose = [p for p in paragraphs if START.match(p) and not re.search(r"::=|>>>|[=*-]{4}", p)]
    found = [s.strip() for p in prose for s in END.split(p)]
    return [s for s in found if 40 <= len(s) <= 300 and len(s.split()) >= 7]


def main() -> None:
    chapter_of: dict[str, set[str]] = {}
    for chapter, names in CHAPTERS.items():
        for sentence in (s for name in names.split() for s in sentences(name)):
            chapter_of.setdefault(sentence, set()).add(chapter)
    keyed = sorted(
        (hashlib.sha256(s.encode()).hexdigest(), s, *c)
        for s, c in chapter_of.items()
        if len(c) == 1
    )
    with (Path(__file__).parent / "pydocs.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["split", "chapter", "text"])
        for key, text, chapter in keyed:
            rows.writerow(("test" if int(key[:8], 16) % 4 == 0 else "train", chapter, text))


if __name__ == "__main__":
    main()

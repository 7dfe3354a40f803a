"""The displayed formulas of the course notes, found in their text, and a fingerprint of each.

    python tests/notes_formulas.py FOLDER

prints them, note by note. The notes are no part of this repository: `tests/notes.json` has fingerprints alone.
"""

import hashlib
import re
import sys
from pathlib import Path

NOTES = ("000", "001", "002", "003", "004")
# An English word of four letters or more; names of mathematics, which lost their commands in conversion, are none.
WORD = re.compile(r"\b(?!target|init|data|label|Unif)[A-Za-z][a-z]{3,}\b")


def formulas(note, text):
    """Every displayed formula of a note, and every algorithm, in their order.

    000, 001 and 004 have LaTeX between brackets or dollars. 002 has bare LaTeX, of which every line counts that has a command or a brace.
    003 has lost its LaTeX: lines of signs count that have hardly a word.
    """
    if note in ("000", "004"):
        return re.findall(r"\\\[.*?\\\]|\\\(\\begin\{align\*?\}.*?\\end\{align\*?\}\\\)", text, re.DOTALL)
    if note == "001":
        return re.findall(r"\$\$.*?\$\$", text, re.DOTALL)
    if note == "002":
        return [line for line in text.splitlines() if re.search(r"\\[a-zA-Z]|[{}]", line)]
    found = []
    for part in re.split(r"(\\begin\{algorithm\}.*?(?:\\end\{algorithm\}|\Z))", text, flags=re.DOTALL):
        if part.startswith(r"\begin{algorithm}"):
            found.append(part)
        else:
            lines = part.splitlines()
            found += [line for line in lines if re.search(r"[=∼∈→∣⇔⇒⋅]|−div", line) and len(WORD.findall(line)) <= 3]
    return found


def fingerprint(formula):
    return hashlib.sha256(re.sub(r"\s", "", formula).encode()).hexdigest()[:12]


def read(folder):
    """note -> its formulas, from the files of a folder whose names begin with the notes' numbers."""
    return {note: formulas(note, next(Path(folder).glob(f"{note}*")).read_text()) for note in NOTES}


if __name__ == "__main__":
    for note, found in read(sys.argv[1]).items():
        for number, formula in enumerate(found, 1):
            print(note, number, fingerprint(formula), " ".join(formula.split()))

"""Every displayed formula of the course notes has its row in docs/formulas.md, and every row its function, its test and its lesson."""

import hashlib
import json
import os
import re
from pathlib import Path

import notes_formulas
import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "formulas.md").read_text()
INDEX = json.loads((ROOT / "tests" / "notes.json").read_text())
# Of its fingerprints and rows, which nothing else holds where the notes are not at hand.
INDEX_SHA256 = "b96e141f119203d9e3f7bdf34e28bdb465b2ee8a99b0da2fb3850665bd5c2e8f"
# Rows of what the notes say in a sentence, in a figure, or inside a line.
IN_WORDS = {6, 34, 45, 59, 70, 76, 77}


def rows():
    """number -> (formula, lesson, functions, tests, where)."""
    found = {}
    for line in PAGE.splitlines():
        if re.match(r"\| [1-9]\d* \|", line):
            number, *cells = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
            found[int(number)] = cells
    return found


ROWS = rows()


def test_rows_are_numbered_in_their_order():
    assert list(ROWS) == list(range(1, len(ROWS) + 1))


def test_every_displayed_formula_has_a_row():
    missing = [(note, number) for note, formulas in INDEX.items() for number, (_, rows) in enumerate(formulas, 1) if not rows]
    assert not missing
    used = {row for formulas in INDEX.values() for _, rows in formulas for row in rows}
    assert used <= set(ROWS)
    assert set(ROWS) - used == IN_WORDS


def test_the_index_is_as_it_was_compared():
    found = hashlib.sha256(json.dumps(INDEX, sort_keys=True).encode()).hexdigest()
    assert found == INDEX_SHA256, (
        "tests/notes.json has changed: compare it with the notes by `make test NOTES=folder ARGS='-k formulas'`, and each new row with "
        f'its formula by `python tests/notes_formulas.py folder`; then let INDEX_SHA256 be "{found}"'
    )


@pytest.mark.parametrize("number", ROWS)
def test_every_row_has_a_function_a_test_and_a_lesson(number):
    """That functions and tests exist, test_docs.py holds."""
    formula, lesson, functions, tests, where = ROWS[number]
    assert formula
    assert "`" in functions or functions in ("none", "none, as above", "any field")
    assert "::test_" in tests or tests in ("a definition", "a statement", "an existence theorem")
    ((chapter, page),) = re.findall(r"^\[(\d)\]\((lessons/(?:\d)_\w+\.md)(?:#[\w-]+)?\)$", lesson)
    assert Path(page).name.startswith(chapter)
    assert (ROOT / "docs" / page).exists()
    assert set(re.findall(r"\b00\d", where)) <= set(notes_formulas.NOTES)
    assert '"' in where or re.search(r"\b00\d", where)


@pytest.mark.parametrize("chapter", [1, 2, 3, 4, 5, 6])
def test_a_lesson_shows_the_formulas_of_its_rows(chapter):
    """The signs of each formula, in any order and spelling, are on the lesson's page."""
    (page,) = (ROOT / "docs" / "lessons").glob(f"{chapter}_*.md")
    text = page.read_text()
    signs = {
        "\\psi": "\\psi",
        "W_t": "W_",
        "\\sigma_t": "\\sigma",
        "\\nabla \\log": "\\nabla \\log",
        "L_\\mathrm{CFM}": "L_\\mathrm{CFM}",
        "L_\\mathrm{FM}": "L_\\mathrm{FM}",
        "L_\\mathrm{SM}": "L_\\mathrm{SM}",
        "L_\\mathrm{CSM}": "L_\\mathrm{CSM}",
        "L_\\mathrm{DDPM}": "L_\\mathrm{DDPM}",
        "\\dot\\alpha": "\\dot\\alpha",
        "\\partial_t": "\\partial_t",
        "\\tilde u": "\\tilde u",
        "\\varnothing": "\\varnothing",
        "\\eta": "\\eta",
        "\\delta": "\\delta",
        "p_\\mathrm{data}": "p_\\mathrm{data}",
    }
    wanted = {
        sign for number, (formula, lesson, *_) in ROWS.items() if lesson.startswith(f"[{chapter}]") for sign in signs if sign in formula
    }
    missing = sorted(sign for sign in wanted if signs[sign] not in text.replace("\\dot{\\alpha", "\\dot\\alpha"))
    assert not missing, f"{page.name} has not {missing}"


@pytest.mark.skipif("FMJAX_NOTES" not in os.environ, reason="the notes are not here: `make test NOTES=folder` compares them")
def test_the_index_is_that_of_the_notes():
    found = notes_formulas.read(os.environ["FMJAX_NOTES"])
    assert {note: [notes_formulas.fingerprint(each) for each in formulas] for note, formulas in found.items()} == {
        note: [fingerprint for fingerprint, _ in formulas] for note, formulas in INDEX.items()
    }

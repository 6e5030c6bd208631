"""Every "Your turn": its check says no to the start and to a wrong answer, and yes to the solution.

In a notebook the reader changes the cell with the tag `exercise`, and the one with the tag `check`
judges: its stored output is what it says to the start. The folded solution stands after it.
"""

import logging
import re
from pathlib import Path

import nbformat
import pytest

import lesson

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
WRONG = {  # lesson: what makes its solution a wrong answer
    "01_first_flow": ("    if failed:", "    if len(failed) > 1:"),
    "02_retries": ("backoff_factor=2", "backoff_factor=1"),
    "03_mapping": ("max_workers=3", "max_workers=4"),
    "04_rate_limiting": ("slots, new_a_second = 3,", "slots, new_a_second = 14,"),
    "05_caching": ('"stargazers_count" not in', '"message" in {} and "x" not in'),
    "06_star_chart": ("hours=1", "hours=2"),
}


def parts(name):
    """What a lesson's check says to the start, and the sources of the check and the solution."""
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
    tagged = {
        tag: [n for n, cell in enumerate(cells) if tag in cell.metadata.get("tags", [])]
        for tag in ("exercise", "check")
    }
    assert [len(found) for found in tagged.values()] == [1, 1], f"one of each, not {tagged}"
    (exercise,), (check,) = tagged.values()
    between = [cell.cell_type for cell in cells[exercise + 1 : check]]
    assert "code" not in between, "the check is the next code cell"
    solution = cells[check + 1].source
    assert solution.startswith("<details><summary>Solution</summary>")
    (code,) = re.findall(r"^```python\n(.+?)^```$", solution, re.M | re.S)
    told = "".join(
        output.get("text") or output.data["text/plain"] for output in cells[check].outputs
    )
    return told, cells[check].source, code


def claims(told):
    """The lines of a check's claims, and its verdict."""
    *lines, verdict = told.splitlines()
    assert len(lines) > 1
    assert all(re.match(r"(holds|does not hold|not reached) +\| .+: .", line) for line in lines)
    return lines, verdict


@pytest.mark.parametrize("name", WRONG)
def test_the_start_is_not_the_solution_yet(name):
    lines, verdict = claims(parts(name)[0])
    assert not all(line.startswith("holds") for line in lines)
    assert verdict == "Not yet."


@pytest.mark.slow
@pytest.mark.parametrize("answer", ["wrong", "right"])
@pytest.mark.parametrize("name", WRONG)
def test_the_check_knows_right_from_wrong(github, monkeypatch, capsys, name, answer):
    _, check, solution = parts(name)
    old, new = WRONG[name]
    assert old in solution, f"change WRONG for {name}, whose solution has no {old!r}"
    code = solution.replace(old, new) if answer == "wrong" else solution
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.NullHandler()])  # no pytest's
    cell = {"__name__": "__main__", "github": github, "lesson": lesson}
    exec(code, cell)
    capsys.readouterr()
    exec(check, cell)
    lines, verdict = claims(capsys.readouterr().out)
    if answer == "right":
        assert verdict == "Solved."
    else:
        assert verdict == "Not yet."
        assert any(line.startswith("does not hold") for line in lines)

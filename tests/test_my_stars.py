"""The reader's own flow, from lesson 1 to 6: each *Your turn* begins where the one before ended.

In a notebook the reader changes the cell with the tag `exercise`, and the one with the tag `check`
judges: its stored output is the board of the start. The folded solution stands after it.

    pytest -m boards -n 2     whole boards: each lesson's flow keeps exactly its promises
"""

import re
from pathlib import Path

import nbformat
import pytest
from test_notebooks import core_and_deeper, tags

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
START = """\
from prefect import flow

from pipeline import fetch_stats, get_stars


@flow
def my_stars(github_repos):
    for repo in github_repos:
        stats = fetch_stats(repo)
        print(f"{repo}: {get_stars(stats)} stars")
"""
# lesson: what its solution keeps and the start does not; before lesson 1, what the start keeps
WON = {
    0: {
        "at most 16 requests in flight",
        "keeps two APIs' caches apart",
        "never caches a bad response",
    },
    1: {"one failure loses one result", "does not retry a 404"},
    2: {"retries transient failures"},
    3: {"a slow response delays only itself"},
    4: {
        "obeys Retry-After",
        "stays within the rate limit",
        "sends nothing if the limit is missing",
    },
    5: {"never fetches twice"},
    6: {"backs off as a whole", "stops within seconds"},
}
# On the way, in lessons 5 and 6: what the solution does not have yet, and what it does not keep.
ON_THE_WAY = {
    "INPUTS alone": (
        5,
        {
            " + CacheKeyFnPolicy(cache_key_fn=task_and_api)": "",
            'if not isinstance(stats.get("stargazers_count"), int)': "if False",
        },
        {"keeps two APIs' caches apart", "never caches a bad response"},
    ),
    "a gate without an end": (
        6,
        {
            "with shared.turn": "if True",
            "shared.over.wait(": "time.sleep(",
            ", timeout_seconds=3": "",
        },
        {"stops within seconds"},
    ),
}
FLOWS = [*range(7), *ON_THE_WAY]


def cells_of(n: int) -> list:
    (path,) = NOTEBOOKS.glob(f"0{n}_*.ipynb")
    return nbformat.read(path, as_version=4).cells


def turn(n: int) -> tuple[str, str, str]:
    """Of a lesson's *Your turn*: the start, the stored board, the solution."""
    cells = cells_of(n)
    (exercise,) = (i for i, cell in enumerate(cells) if "exercise" in tags(cell))
    (check,) = (i for i, cell in enumerate(cells) if "check" in tags(cell))
    between = [cell.cell_type for cell in cells[exercise + 1 : check]]
    assert "code" not in between, "the check is the next code cell"
    assert cells[check].source == f"import gauntlet\n\ngauntlet.run(my_stars, lesson={n})"
    (board,) = (o.data["text/plain"] for o in cells[check].outputs if "text/plain" in o.data)
    assert cells[check + 1].source.startswith("<details><summary>Solution</summary>")
    (code,) = re.findall(r"^```python\n(.+?)^```$", cells[check + 1].source, re.M | re.S)
    return f"{cells[exercise].source}\n", board, code


def solution(n: int) -> str:
    """The flow as it is after a lesson."""
    return turn(n)[2] if n else START


def replaced(code: str, words: dict[str, str]) -> str:
    for old, new in words.items():
        assert code.count(old) == 1, f"{old!r} is not in the solution once"
        code = code.replace(old, new)
    return code


def flow_of(code: str):
    """The flow `my_stars` that some code defines, as a cell of a notebook does."""
    cell = {"__name__": "__main__"}
    exec(code, cell)
    return cell["my_stars"]


def kept_after(n: int) -> set[str]:
    return set().union(*(WON[lesson] for lesson in range(n + 1)))


def code_and_promises(which: int | str) -> tuple[str, set[str]]:
    """The code of one of FLOWS, and the promises that it keeps on a whole board."""
    if which in ON_THE_WAY:
        n, words, lost = ON_THE_WAY[which]
        return replaced(solution(n), words), kept_after(n) - lost
    return solution(which), kept_after(which)


def held(board) -> set[str]:
    return set(board.index[board["verdict"] == "holds"])


@pytest.mark.parametrize("n", range(1, 7))
def test_a_lesson_begins_with_the_flow_of_the_one_before(n):
    assert turn(n)[0] == solution(n - 1)


@pytest.mark.parametrize("n", range(1, 7))
def test_the_stored_board_is_that_of_the_start(n):
    import gauntlet

    title, *lines = turn(n)[1].splitlines()
    verdicts = {}
    for line, words in zip(lines, gauntlet.but(gauntlet.PROMISES, gauntlet.STORM), strict=True):
        (verdicts[words],) = re.findall(rf"^. (\w.*?) +{re.escape(words)} ", line)
    reached = {words for words in verdicts if gauntlet.ROUNDS[words].lesson <= n}
    assert {words for words, verdict in verdicts.items() if verdict != "not yet"} == reached
    holds = {words for words, verdict in verdicts.items() if verdict == "holds"}
    assert holds == kept_after(n - 1) & reached != reached
    assert title == f"my_stars: {len(holds)} of 13"
    assert kept_after(n) >= reached


@pytest.mark.slow
@pytest.mark.parametrize("which", [which for which in FLOWS[1:-1] if which != 6])
def test_a_solution_keeps_the_promises_of_its_lesson(github, which):
    """Lesson 8 has the whole board of lesson 6's."""
    import gauntlet

    n = which if which in WON else ON_THE_WAY[which][0]
    taught = [words for words, one in gauntlet.ROUNDS.items() if one.lesson == n]
    code, promises = code_and_promises(which)
    board = gauntlet.run(flow_of(code), *taught)
    assert held(board) == promises & set(taught), str(board)


@pytest.mark.boards
@pytest.mark.parametrize("which", FLOWS)
def test_a_flow_keeps_exactly_its_promises(github, which):
    import gauntlet

    code, promises = code_and_promises(which)
    board = gauntlet.run(flow_of(code))
    assert held(board) == promises, str(board)


def test_lesson_8_plays_the_solution_of_lesson_6():
    (mine,) = (cell for cell in cells_of(8) if cell.source.startswith("%%writefile my_stars.py\n"))
    assert mine.source.partition("\n")[2] + "\n" == solution(6)
    boards = [
        output.data["text/plain"]
        for cell in cells_of(8)
        if cell.cell_type == "code"
        for output in cell.outputs
        if "text/plain" in output.get("data", {})
    ]
    (board,) = (board for board in boards if board.startswith("my_stars: 1"))
    assert board.startswith("my_stars: 14 of 14\n")


def test_each_cure_is_taught_in_the_core_of_its_lesson():
    import gauntlet

    for words, one in gauntlet.ROUNDS.items():
        number, _, heading = one.cure.partition(" · ")
        (path,) = NOTEBOOKS.glob(f"0{number}_*.ipynb")
        core, _ = core_and_deeper(nbformat.read(path, as_version=4))
        prose = "\n".join(cell.source for cell in core if cell.cell_type == "markdown")
        assert f"\n## {heading}\n" in f"\n{prose}\n", words

"""The gauntlet of lesson 8: what holds is said to hold, and what does not is not.

The boards of lesson 1's flow, the usual form and `show_stars` are outputs of the notebook, which
nbval compares; each promise is broken by one of them. Here the folded solution keeps them all, and
without one line exactly one less.

    pytest -m boards -n 2     a whole board for each promise taken out: two minutes
"""

import os
import re
import sys
import time
from pathlib import Path

import nbformat
import pytest
from prefect import flow
from prefect.settings import get_current_settings

ROOT = Path(__file__).parents[1]
NOTEBOOK = nbformat.read(ROOT / "notebooks" / "08_gauntlet.ipynb", as_version=4)

# promise: what to replace in the solution so that it is not kept any more
TAKEN_OUT = {
    "heals what can heal": [("error.response.is_server_error or ", "")],
    "asks once what cannot": [("    retry_condition_fn=can_heal,\n", "")],
    "waits as told": [("    time.sleep(", "    int(")],
    "does not hang": [("timeout=4", "timeout=None")],
    "loses one for one": [("raise RuntimeError(", "print(")],
    "is not too many at once": [("task_runner=ThreadPoolTaskRunner(max_workers=8)", "")],
    "is not poisoned": [('int(response.json()["stargazers_count"])', "response.json().get(STARS)")],
    "pays once": [("    cache_policy=INPUTS + CacheKeyFnPolicy(cache_key_fn=task_and_api),\n", "")],
    "keeps two APIs apart": [(" + CacheKeyFnPolicy(cache_key_fn=task_and_api)", "")],
    "is never refused": [
        ('    rate_limit("github-api", strict=True)\n', ""),
        ("    futures = ", '    rate_limit("github-api", strict=True)\n    futures = '),
    ],
    "asks nobody without a limit": [("strict=True)\n    url", "strict=False)\n    url")],
}  # fmt: skip


def solution() -> str:
    """The folded solution of "Your turn"."""
    prose = "\n".join(cell.source for cell in NOTEBOOK.cells if cell.cell_type == "markdown")
    (code,) = re.findall(r"Solution</summary>\n\n```python\n(.+?)^```$", prose, re.M | re.S)
    return code


def flow_of(code: str, name: str = "whole_flow"):
    """The flow that some code defines, as a cell of a notebook does."""
    cell = {"__name__": "__main__", "STARS": "stargazers_count"}
    exec(code, cell)
    return cell[name]


def without(promise: str):
    code = solution()
    for old, new in TAKEN_OUT[promise]:
        assert code.count(old) == 1, f"change TAKEN_OUT: {old!r} is not in the solution once"
        code = code.replace(old, new)
    return flow_of(code)


@pytest.fixture
def gauntlet(github):
    import gauntlet

    return gauntlet


def failing(board) -> list[str]:
    return board.index[board["verdict"] != "holds"].tolist()


def test_the_solution_keeps_every_promise(gauntlet):
    board = gauntlet.run(flow_of(solution()), *gauntlet.ROUNDS)
    assert list(board.index) == [*TAKEN_OUT, gauntlet.STORM]
    assert not failing(board), board.to_string()


@pytest.mark.parametrize("promise", TAKEN_OUT)
def test_each_promise_can_be_taken_out(promise):
    assert without(promise).name == flow_of(solution()).name


@pytest.mark.boards
@pytest.mark.parametrize("promise", TAKEN_OUT)
def test_a_promise_taken_out_changes_no_other_line(gauntlet, promise):
    patience = 20 if promise == "does not hang" else gauntlet.PATIENCE
    board = gauntlet.run(without(promise), patience=patience)
    assert failing(board) == [promise], board.to_string()
    assert board["cure"][promise]


def test_the_hints_lead_through_the_rounds(gauntlet):
    sources = [cell.source for cell in NOTEBOOK.cells]
    (begin,) = (n for n, source in enumerate(sources) if source.startswith("## Your flow"))
    (end,) = (n for n, source in enumerate(sources) if source.startswith("## It heals"))
    pieces = [cell.source for cell in NOTEBOOK.cells[begin:end] if cell.cell_type == "code"]
    lines = re.findall(r"Hint 3: .+?```python\n(.+?)^```$", "\n".join(sources), re.M | re.S)
    exercises = [cell for cell in NOTEBOOK.cells if "exercise" in cell.metadata.get("tags", [])]
    assert len(lines) == len(exercises) - 1  # the last one is "Your turn"
    mine = flow_of("\n".join(["from prefect import flow", *pieces, *lines]), "my_stars")
    board = gauntlet.run(mine, *(words for words, one in gauntlet.ROUNDS.items() if not one.limit))
    assert not failing(board), board.to_string()


def test_the_cures_are_sections_of_the_lessons(gauntlet):
    for words, one in gauntlet.ROUNDS.items():
        number, _, heading = one.cure.partition(" · ")
        (path,) = (ROOT / "notebooks").glob(f"0{number}_*.ipynb")
        notebook = nbformat.read(path, as_version=4)
        assert any(cell.source.startswith(f"## {heading}\n") for cell in notebook.cells), words


# --- Flows that are none, or little of one --------------------------------------------------------


@flow
def returns_nothing(github_repos):
    pass


@flow
def raises_at_once(github_repos):
    raise KeyError("at once")


@flow
def makes_up_numbers(github_repos):
    for repo in github_repos:
        print(f"{repo}: 42 stars")


@flow
def hangs(github_repos):
    while True:
        time.sleep(1)


@pytest.mark.parametrize(
    ("contestant", "verdict", "evidence"),
    [
        (returns_nothing, "not reached", "the run ended before it"),
        (raises_at_once, "not reached", "the run ended before it (KeyError)"),
        (makes_up_numbers, "does not hold", "printed a count that is not the API's"),
    ],
)
def test_a_flow_that_asks_nobody_keeps_no_promise(gauntlet, contestant, verdict, evidence):
    board = gauntlet.run(contestant, "heals what can heal", "pays once", "is never refused")
    assert len(board) == 3
    assert set(board["verdict"]) == {verdict}
    assert set(board["evidence"]) == {evidence}


def test_a_flow_that_hangs_is_ended(gauntlet):
    board = gauntlet.run(hangs, "does not hang", "pays once", "is never refused", patience=3)
    assert board["verdict"].to_dict() == {
        "does not hang": "does not hold",
        "pays once": "not reached",
        "is never refused": "not reached",
    }
    assert board["evidence"].tolist() == [
        *["still running after 3 s"] * 2,
        "not tried: no run came to its end",
    ]


@flow
def checks_what_it_knows(github_repos):
    assert "PATH" not in os.environ
    assert get_current_settings().tasks.refresh_cache
    assert "pipeline" not in sys.modules  # as it was before somebody edited it


def test_a_run_knows_what_its_kernel_knows_now(gauntlet, monkeypatch):
    gauntlet.run(returns_nothing, "pays once")  # from here on there is a process to fork
    monkeypatch.delenv("PATH")
    monkeypatch.setattr(get_current_settings().tasks, "refresh_cache", True)
    board = gauntlet.run(checks_what_it_knows, "pays once")
    assert board["evidence"].tolist() == ["the run ended before it"]  # and not by an error


def test_what_cannot_take_part_is_told_so_in_a_sentence(gauntlet, github):
    for wrong, message in (
        (returns_nothing.fn, "takes a flow, a function with @flow above it, not a function"),
        ("my_stars", "not 'str'"),
        (flow(lambda github_repos: github.url), "cannot be sent to another process"),
    ):
        with pytest.raises(TypeError, match=message):
            gauntlet.run(wrong)
    with pytest.raises(ValueError, match="No such promise: is perfect"):
        gauntlet.run(returns_nothing, "is perfect")

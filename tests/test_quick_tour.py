"""What the tour says its flow still gets wrong is so, of the flow as it stands in the tour."""

from datetime import timedelta
from pathlib import Path

import nbformat
import pytest

import lesson
from pipeline import REPOS

TOUR = Path(__file__).parents[1] / "notebooks" / "00_quick_tour.ipynb"
CELLS = nbformat.read(TOUR, as_version=4).cells


@pytest.fixture
def names():
    """What the cells define that have the tour's last flow and its tasks."""
    names = {}
    for cell in CELLS:
        if "def fetch(" in cell.source or "def show_stars(" in cell.source:
            exec(cell.source, names)
    return names


@pytest.fixture
def show_stars(github, names):
    return names["show_stars"]


def test_a_404_gets_four_requests(github, show_stars):
    assert show_stars(["PrefectHQ/perfect"], return_state=True).is_failed()
    assert github.requests["status"].tolist() == [404] * 4


def test_one_failure_loses_all(github, show_stars, capsys):
    with lesson.quiet():
        state = show_stars([*REPOS, "PrefectHQ/perfect"], return_state=True)
    assert "UnfinishedRun" in state.message
    assert (github.requests["status"] == 200).sum() == 3
    assert capsys.readouterr().out == ""


def test_the_limit_is_twice_too_large(github, show_stars):
    line = 'lesson.new_limit("github-api", limit=60, slot_decay_per_second=60 / 3600)'
    assert line in [line for cell in CELLS for line in cell.source.splitlines()]
    # The same with 6 requests in 6 seconds, instead of 60 in an hour.
    github.rate_limit, github.rate_window = 6, 6
    lesson.new_limit("github-api", limit=6, slot_decay_per_second=1)
    show_stars([f"load-test/repository-{n}" for n in range(8)], return_state=True)
    assert 403 in github.requests["status"].tolist()


def test_a_useless_response_fails_each_run_from_the_cache(github, show_stars, names):
    github.fail(REPOS[0], body={"message": "come back later"})
    for requests in 1, 0:
        assert "KeyError" in show_stars(REPOS[:1], return_state=True).message
        assert len(github.requests) == requests
        github.reset()
    assert names["fetch"].cache_expiration == timedelta(days=1)

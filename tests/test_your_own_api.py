"""Lesson 9's files, as a reader takes them home: with the folded solution in place of the start."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
ARTICLES = ["Ada_Lovelace", "AC/DC", "Python_(programming_language)"]


@pytest.fixture
def folder(tmp_path):
    """What the cells with %%writefile save; `my_pipeline.py` is the solution."""
    lesson = nbformat.read(ROOT / "notebooks" / "09_your_own_api.ipynb", as_version=4)
    sources = [cell.source for cell in lesson.cells]
    files = [re.match(r"%%writefile (\w+\.py)\n(.+)", source, re.S) for source in sources]
    (solution,) = re.findall(r"^```python\n(.+?)^```$", "\n".join(sources), re.M | re.S)
    for name, source in (file.groups() for file in files if file):
        (tmp_path / name).write_text(solution if name == "my_pipeline.py" else source)
    assert {path.name for path in tmp_path.iterdir()} == {
        "my_api.py",
        "my_pipeline.py",
        "wikimedia.py",
    }
    return tmp_path


@pytest.fixture
def views(folder, github):
    """Its practice API. No limit is there, as on a new Prefect server."""
    import lesson

    cell = {}
    exec((folder / "my_api.py").read_text(), cell)
    lesson.delete_limit(cell["API"].limit)
    with cell["API"].practice(latency=0) as api:
        yield api


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=220,
    )


def limit():
    from prefect import get_client

    with get_client(sync_client=True) as prefect:
        return prefect.read_global_concurrency_limit_by_name("wikimedia-api").limit


@pytest.mark.slow
def test_the_solution_keeps_every_promise(github, folder):
    files = [f"{folder}/my_pipeline.py:show_views", "--api", f"{folder}/my_api.py:API"]
    done = python(ROOT / "notebooks" / "gauntlet.py", *files)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("show_views: 13 of 13\n")


@pytest.mark.slow
def test_the_program_makes_its_limit_asks_once_and_says_what_failed(views, folder):
    import lesson

    def program():
        done = python(folder / "my_pipeline.py", WIKIMEDIA_API_URL=views.url)
        return done.returncode, [line.split(": ")[0] for line in done.stdout.splitlines()]

    views.fail("AC/DC", status=404)
    assert program() == (1, [ARTICLES[0], ARTICLES[2]])
    assert limit() == 20
    lesson.new_limit("wikimedia-api", 7, 1)
    assert program() == (0, ARTICLES)
    assert limit() == 7
    assert program() == (0, ARTICLES)
    assert sorted(views.requests["name"]) == sorted([*ARTICLES, "AC/DC"])

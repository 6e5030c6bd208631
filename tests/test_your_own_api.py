"""Lesson 9's files, as a reader takes them home: with the folded solution in place of the start."""

import os
import re
import secrets
import subprocess
import sys
from datetime import date, timedelta
from pathlib import Path

import nbformat
import pytest
from prefect import flow

from practice_api import Api, load

ROOT = Path(__file__).parents[1]
LESSON = nbformat.read(ROOT / "notebooks" / "09_your_own_api.ipynb", as_version=4)
SOURCES = [cell.source for cell in LESSON.cells]
(SOLUTION,) = re.findall(r"^```python\n(.+?)^```$", "\n".join(SOURCES), re.M | re.S)
ARTICLES = ["Ada_Lovelace", "AC/DC", "Python_(programming_language)"]


@pytest.fixture
def folder(tmp_path):
    """What the cells with %%writefile save; `my_pipeline.py` is the solution."""
    for source in SOURCES:
        if file := re.match(r"%%writefile (-a )?(\w+\.py)\n(.+)", source, re.S):
            added, name, text = file.groups()
            with open(tmp_path / name, "a" if added else "w") as opened:
                opened.write(SOLUTION if name == "my_pipeline.py" else f"{text}\n")
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
def test_the_program_makes_its_limit_fetches_once_and_says_what_failed(views, folder):
    import lesson

    def program():
        done = python(folder / "my_pipeline.py", WIKIMEDIA_API_URL=views.url)
        assert "Traceback" not in done.stderr or done.returncode
        return done.returncode, [line.split(": ")[0] for line in done.stdout.splitlines()]

    views.fail("AC/DC", status=404)
    assert program() == (1, [ARTICLES[0], ARTICLES[2]])
    assert limit() == 20
    lesson.new_limit("wikimedia-api", 7, 1)
    assert program() == (0, ARTICLES)
    assert limit() == 7
    assert program() == (0, ARTICLES)
    assert sorted(views.requests["name"]) == sorted([*ARTICLES, "AC/DC"])


def test_the_exercise_starts_with_the_flow_of_lesson_6():
    """Under another name, and as a program."""
    (path,) = (ROOT / "notebooks").glob("06_*.ipynb")
    prose = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
    (exercise,) = (s for s in SOURCES if s.startswith("%%writefile my_pipeline.py\n"))
    start, program = exercise.partition("\n")[2].split("\n\n\nif __name__")
    assert f"```python\n{start.replace('show_views', 'my_stars')}\n```" in prose
    assert SOLUTION.endswith(f"\n\n\nif __name__{program}\n")


def test_the_month_is_the_last_one_that_is_over_unless_it_is_given(views, folder):
    script = "from my_pipeline import *; show_views(['AC/DC'], '2020010100/2020013100')"
    done = python("-c", script, WIKIMEDIA_API_URL=views.url, PYTHONPATH=f"{folder}:{ROOT}")
    assert done.returncode == 1
    last = (date.today().replace(day=1) - timedelta(days=1)).strftime("%Y%m")
    assert views.api.path.endswith(f"/monthly/{last}0100/{last}{views.api.path[-4:-2]}00")
    [requested] = views.requests["name"]
    assert requested.endswith("AC%2FDC/monthly/2020010100/2020013100")


# --- A weather API: a key, degrees below zero, a name in the query -------------------------------

WEATHER = Api(
    path="/weather?q={name}&units=metric",
    answer=lambda name, number: {"city": name, "main": {"temp": number}},
    number=lambda number: number / 100 - 40,
    line="{name}: {number} degrees",
    variable="WEATHER_API_URL",
    limit="weather-api",
    headers={"Authorization": "Bearer key-of-this-test"},
)
CLIENT = """\
import os
from urllib.parse import quote

import httpx

HEADERS = {"Authorization": "Bearer key-of-this-test"}
client = httpx.Client(headers=HEADERS, timeout=5)


def address(city):
    base = os.environ.get("WEATHER_API_URL")
    return f"{base}/weather?q={quote(city, safe='')}&units=metric"
"""
# What is Wikimedia's in the solution, and what this API has in its place.
WORDS = {
    "from wikimedia import address, client, last_month\n": CLIENT,
    "import httpx\n": "",
    "wikimedia-api": "weather-api",
    "address(article, month or last_month())": "address(article)",
    '["items"][0]["views"]': '["main"]["temp"]',
    "{count} views": "{count} degrees",
    "days=30": "hours=1",
}
KEY = "keeps the key to itself"
CURE = "9 · Where a key lives"
# what is wrong: (old, new, promise, evidence, cure)
WRONG = {
    "served for ever": (
        "    cache_expiration=timedelta(hours=1),\n", "",
        "never fetches twice", "saves results for ever: no cache_expiration", ""),
    "the key in the address": (
        "&units=metric", "&units=metric&appid=key-of-this-test",
        KEY, "the key is in the output, Prefect's logs, Prefect's states, saved results", CURE),
    "the key in a pickle": (
        '    result_serializer="json",\n', "", KEY, "the key is in saved results", CURE),
    "int": (
        "return count", "return int(count)",
        "never fetches twice", r"printed '-?\d+' for Zoë & Co/\d+, the API has -?\d+\.\d+", ""),
    "null is cached": (
        "if not isinstance(count, (int, float))", "if False",
        "never caches a bad response", "the next run printed 1 of 3 and 'None' and 'n/a'",
        "5 · One bad moment, a day of failures"),
    "no quote": (
        "quote(city, safe='')", "city",
        "one failure loses one result", r"printed '.+' for Zoë & Co/\d+, the API has .+", ""),
    "no key": (
        "headers=HEADERS, ", "",
        "one failure loses one result",
        r"requested /weather\?q=Zo%C3%AB.+&units=metric \(401\)", ""),
    "another line": (
        "{article}: {count} degrees", "{article} = {count}",
        "keeps two APIs' caches apart",
        r"expected lines like \{name\}: \{number\} degrees, not 'Zoë & Co/\d+ = .+", ""),
    "no request": (
        "WEATHER_API_URL", "WETTER_API_URL",
        "keeps two APIs' caches apart", r"sent no request to WEATHER_API_URL \(RuntimeError\)", ""),
}  # fmt: skip


def replaced(code: str, words: dict[str, str]) -> str:
    for old, new in words.items():
        assert old in code, f"not in the solution: {old!r}"
        code = code.replace(old, new, 1) if old == "import httpx\n" else code.replace(old, new)
    return code


def weather_flow(folder, words: dict[str, str]):
    """The solution for the weather API, with these words replaced, from a file."""
    path = folder / f"weather_{secrets.token_hex(8)}.py"
    path.write_text(replaced(replaced(SOLUTION, WORDS), words))
    return load(f"{path}:show_views")


@pytest.mark.slow
@pytest.mark.parametrize("wrong", WRONG)
def test_a_red_line_says_what_was_seen(github, tmp_path, monkeypatch, wrong):
    import gauntlet

    monkeypatch.setattr(sys, "path", list(sys.path))
    old, new, promise, evidence, cure = WRONG[wrong]
    flow = weather_flow(tmp_path, {old: new})
    [row] = gauntlet.run(flow, promise, api=WEATHER).itertuples()
    assert row.verdict == ("not reached" if wrong == "no request" else "does not hold")
    assert re.fullmatch(evidence, row.evidence), row.evidence
    assert row.cure == cure


@pytest.mark.slow
def test_a_key_in_the_address_can_be_kept(github, tmp_path, monkeypatch):
    """As the lesson says: no argument has it, and no message."""
    import gauntlet

    monkeypatch.setattr(sys, "path", list(sys.path))
    flow = weather_flow(
        tmp_path,
        {
            "client.get(url)": 'client.get(f"{url}&appid=key-of-this-test")',
            "    response.raise_for_status()\n": (
                "    if response.is_error:\n"
                '        message = f"{url}: {response.status_code}"\n'
                "        raise httpx.HTTPStatusError(\n"
                "            message, request=response.request, response=response)\n"
            ),
        },
    )
    board = gauntlet.run(flow, KEY, "retries transient failures", api=WEATHER)
    assert board["verdict"].tolist() == ["holds", "holds"], str(board)


def test_only_an_api_with_a_key_has_the_promise(github):
    import gauntlet

    assert KEY == gauntlet.KEY
    assert KEY not in gauntlet.ROUNDS
    assert list(gauntlet.rounds_for(WEATHER)) == [*gauntlet.ROUNDS, KEY]
    with pytest.raises(ValueError, match="No such promise: keeps the key to itself"):
        gauntlet.run(flow(lambda github_repos: None), KEY)
    assert "## Where a key lives" in [source.partition("\n")[0] for source in SOURCES]
    assert gauntlet.KEYED[KEY].cure == CURE

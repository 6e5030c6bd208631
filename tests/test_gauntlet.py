"""The gauntlet of lessons 8 and 9: what holds is said to hold, and what does not is not.

The boards of lesson 1's flow, the usual form and `show_stars` are outputs of a notebook, which
nbval compares; each promise is broken by one of them. Here a solution keeps them all, for GitHub
and for another API, and without one line exactly one less.

    pytest -m boards -n 2     a whole board for each promise taken out: ten minutes
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from prefect import flow
from prefect.settings import get_current_settings

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "08_gauntlet.ipynb"
PAGE_VIEWS = """
from practice_api import Api

BEGIN = "/metrics/pageviews/per-article/en.wikipedia/all-access/all-agents/"
API = Api(
    path=BEGIN + "{name}/monthly/2026010100/2026013100",
    answer=lambda name, number: {"items": [{"article": name, "views": number}]},
    line="{name}: {number} views",
    variable="WIKIMEDIA_API_URL",
    limit="wikimedia-api",
)
"""
# What is GitHub's in the solution of lesson 8, and what another API has in its place.
PATH = "/metrics/pageviews/per-article/en.wikipedia/all-access/all-agents/"
WORDS = {
    "github": {},
    "page views": {
        '"github-api"': '"wikimedia-api"',
        "GITHUB_API_URL": "WIKIMEDIA_API_URL",
        "/repos/{repo}": PATH + "{quote(repo, safe='')}/monthly/2026010100/2026013100",
        'int(response.json()["stargazers_count"])': 'int(response.json()["items"][0]["views"])',
        '.get("stargazers_count")': '.get("items", [{"views": None}])[0]["views"]',
        " stars": " views",
        "import httpx\n": "from urllib.parse import quote\n\nimport httpx\n",
    },
}

# promise: what to replace in the solution so that it is not kept any more
TAKEN_OUT = {
    "retries what can heal": ("error.response.is_server_error or ", ""),
    "one failure costs one result": ("raise RuntimeError(f", "print(f"),
    "asks a 404 once": ("    retry_condition_fn=can_heal,\n", ""),
    "does not wait for the slowest": ("timeout=4", "timeout=None"),
    "never more than 16 at once": ("task_runner=ThreadPoolTaskRunner(max_workers=8)", ""),
    "waits as told": ("time.monotonic() + wait)", "time.monotonic() + min(wait, 4))"),
    "is never refused": (  # a slot for two requests
        'rate_limit("github-api", strict=True, timeout_seconds=3)',
        'shared.pop("spare", 0) or shared.update('
        'spare=not rate_limit("github-api", strict=True, timeout_seconds=3))',
    ),
    "sends nothing without a limit": ("strict=True, t", "strict=False, t"),
    "one refusal holds back everybody": (
        'shared["not before"] = max(shared["not before"], time.monotonic() + wait)',
        "time.sleep(wait)",
    ),
    "pays once": (
        "stars_of.map(github_repos)",
        "stars_of.with_options(refresh_cache=len(github_repos) < 5).map(github_repos)",
    ),
    "keeps two APIs apart": (" + CacheKeyFnPolicy(cache_key_fn=task_and_api)", ""),
    "never caches a bad answer": (
        'int(response.json()["stargazers_count"])',
        'response.json().get("stargazers_count")',
    ),
    "can be stopped while it waits": ('        shared["over"].set()\n', "        pass\n"),
}


def solution(api: str, without: str | None = None) -> str:
    """The folded solution of lesson 8; for another API, and without one of its promises."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    (code,) = re.findall(r"Solution</summary>\n\n```python\n(.+?)^```$", prose, re.M | re.S)
    if without is not None:
        old, new = TAKEN_OUT[without]
        assert code.count(old) == 1, f"change TAKEN_OUT: {old!r} is not in the solution once"
        code = code.replace(old, new)
    for words, others in WORDS[api].items():
        code = code.replace(words, others)
    return code


def flow_of(code: str, name: str = "my_stars"):
    """The flow that some code defines, as a cell of a notebook does."""
    cell = {"__name__": "__main__"}
    exec(code, cell)
    return cell[name]


@pytest.fixture
def gauntlet(github):
    import gauntlet

    return gauntlet


@pytest.fixture
def apis(gauntlet):
    cell = {}
    exec(PAGE_VIEWS, cell)
    return {"github": gauntlet.GITHUB, "page views": cell["API"]}


def failing(board) -> list[str]:
    return board.index[board["verdict"] != "holds"].tolist()


def test_the_solution_keeps_every_promise(gauntlet):
    board = gauntlet.run(flow_of(solution("github")), *gauntlet.ROUNDS)
    assert list(board.index) == [*TAKEN_OUT, gauntlet.STORM]
    assert not failing(board), str(board)


@pytest.mark.parametrize("api", WORDS)
@pytest.mark.parametrize("promise", TAKEN_OUT)
def test_each_promise_can_be_taken_out(promise, api):
    assert flow_of(solution(api, without=promise)).name == "my-stars"


@pytest.mark.boards
@pytest.mark.parametrize("api", WORDS)
@pytest.mark.parametrize("promise", TAKEN_OUT)
def test_a_promise_taken_out_changes_no_other_line(gauntlet, apis, promise, api):
    patience = 20 if promise == "does not wait for the slowest" else gauntlet.PATIENCE
    mine = flow_of(solution(api, without=promise))
    board = gauntlet.run(mine, api=apis[api], patience=patience)
    assert failing(board) == [promise], str(board)
    assert board["cure"][promise]


def test_the_cures_are_sections_of_the_lessons():
    import gauntlet

    for words, one in gauntlet.ROUNDS.items():
        number, _, heading = one.cure.partition(" · ")
        (path,) = (ROOT / "notebooks").glob(f"0{number}_*.ipynb")
        notebook = nbformat.read(path, as_version=4)
        lines = [cell.source.partition("\n")[0].lstrip("# ") for cell in notebook.cells]
        assert heading in lines, words


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


SOME = "retries what can heal", "pays once", "is never refused", "can be stopped while it waits"


@pytest.mark.parametrize(
    ("contestant", "verdict", "evidence"),
    [
        (returns_nothing, "not reached", "the run ended before the attack"),
        (raises_at_once, "not reached", "the run ended before the attack (KeyError)"),
        (makes_up_numbers, "does not hold", "printed a number that is not the API's"),
    ],
)
def test_a_flow_that_asks_nobody_keeps_no_promise(gauntlet, contestant, verdict, evidence):
    board = gauntlet.run(contestant, *SOME)
    assert len(board) == 4
    assert set(board["verdict"]) == {verdict}
    assert set(board["evidence"]) == {evidence}


def test_a_flow_that_hangs_is_ended(gauntlet):
    chosen = "does not wait for the slowest", "pays once", "is never refused"
    board = gauntlet.run(hangs, *chosen, patience=3)
    assert board["verdict"].to_dict() == {
        "does not wait for the slowest": "does not hold",
        "is never refused": "not reached",
        "pays once": "not reached",
    }
    assert board["evidence"].tolist() == [
        "still running after 3 s",
        "no run came to its end",
        "still running after 3 s",
    ]


@pytest.mark.parametrize(
    ("old", "new", "evidence"),
    [
        ("for repo in github_repos:\n        if", "for repo in github_repos[::-1]:\n        if",
         "printed 5 of 5 others in another order, the run failed"),
        ("raise RuntimeError(f", "print(f", "printed 5 of 5 others, the run completed"),
    ],
)  # fmt: skip
def test_lines_in_another_order_and_a_run_that_hides_a_loss(gauntlet, old, new, evidence):
    code = solution("github")
    assert old in code
    board = gauntlet.run(flow_of(code.replace(old, new)), "one failure costs one result")
    assert board["verdict"].tolist() == ["does not hold"]
    assert board["evidence"].tolist() == [evidence]


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
    assert board["evidence"].tolist() == ["the run ended before the attack"]  # not by an error


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
    with pytest.raises(TypeError, match="api must be an Api"):
        gauntlet.run(returns_nothing, api="https://api.github.com")


# --- The board ------------------------------------------------------------------------------------


def board_of(gauntlet, **verdicts):
    board = gauntlet.Board("", index=list(verdicts), columns=list(gauntlet.COLUMNS))
    board.attrs["flow"] = "my_flow"
    for words, verdict in verdicts.items():
        board.loc[words] = verdict, "seen", ""
    return board


def test_a_board_says_the_same_with_and_without_colours(gauntlet):
    board = board_of(gauntlet, one="holds", two="does not hold", three="not reached")
    assert str(board).splitlines() == [
        "my_flow: 1 of 3",
        "✓ holds          one    seen",
        "✗ does not hold  two    seen",
        "\N{EN DASH} not reached    three  seen",
    ]
    html = board._repr_html_()
    head, *rest = str(board).split("1 of 3")
    assert re.sub(r"<[^>]*>", " ", html).split() == (
        f"{head} 1 of 3 verdict promise evidence cure {rest[0]}".split()
    )
    assert len(set(re.findall(r"background: (#\w+)", html))) == 3


def test_a_picture_of_boards_is_saved(gauntlet, tmp_path, monkeypatch):
    import charts

    drawn = []
    monkeypatch.setattr(charts, "show", lambda figure, alt: drawn.append((figure, alt)))
    one = board_of(gauntlet, first="holds", second="does not hold")
    other = board_of(gauntlet, first="not reached")
    gauntlet.picture({"mine": one, "another's": other}, tmp_path / "boards.png")
    assert (tmp_path / "boards.png").read_bytes().startswith(b"\x89PNG")
    [(figure, alt)] = drawn
    assert alt == "Which promises hold: mine 1 of 2, another's 0 of 1"
    assert [text.get_text() for text in figure.axes[0].texts] == ["✓", "✗", "\N{EN DASH}"]


# --- From a file, from a script, from a terminal --------------------------------------------------


def command(*arguments, **environment):
    """Run Python as a reader would in a terminal: the lessons' server is the one of this test."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_the_exit_code_says_whether_all_hold(gauntlet, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "one_of_two.py").write_text(solution("github", without="keeps two APIs apart"))
    target = f"{tmp_path}/one_of_two.py:my_stars"
    assert gauntlet.main([target, "keeps two APIs apart"]) == 1
    assert capsys.readouterr().out.startswith("my_stars: 0 of 1\n✗ does not hold")
    assert gauntlet.main([target, "waits as told"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{0}/broken.py"], "does not read FILE.py:NAME"),
        (["{0}/broken.txt:flow"], "does not read FILE.py:NAME"),
        (["{0}/nowhere.py:flow"], "there is no file"),
        (["{0}/broken.py:flow"], "cannot import"),
        (["{0}/things.py:flow_"], "there is no flow_ in"),
        (["{0}/things.py:number"], "takes a flow"),
        (["{0}/things.py:my_flow", "is perfect"], "No such promise: is perfect"),
        (["{0}/things.py:my_flow", "--api", "{0}/things.py:number"], "is no Api"),
    ],
)
def test_what_the_command_cannot_run_is_one_line(
    gauntlet, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "things", raising=False)
    (tmp_path / "broken.py").write_text("raise SystemExit('no')")
    (tmp_path / "things.py").write_text(
        "from prefect import flow\n\nnumber = 3\n\n\n@flow\ndef my_flow(names):\n    pass\n"
    )
    assert gauntlet.main([argument.format(tmp_path) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_a_script_runs_once_and_leaves_nothing_behind(gauntlet, tmp_path):
    folder = tmp_path / ("x" * max(1, 125 - len(str(tmp_path))))
    folder.mkdir()
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT / 'notebooks')!r})\nimport gauntlet\n"
        f"print('once')\n{solution('github')}\n"
        "print(gauntlet.run(my_stars, 'keeps two APIs apart'))\n"
    )
    done = command(script, TMPDIR=str(folder))
    assert done.stdout.splitlines()[0] == "once", done.stderr
    assert done.stdout.splitlines()[1] == "my_stars: 1 of 1"
    assert len(done.stdout.splitlines()) == 3
    assert done.returncode == 0, done.stderr
    assert list(folder.iterdir()) == []
    started = psutil.process_iter(["environ"])
    assert [p for p in started if (p.info["environ"] or {}).get("TMPDIR") == str(folder)] == []


def test_where_a_fork_is_not_safe_each_run_starts_anew(gauntlet, monkeypatch):
    import runs

    monkeypatch.setattr(runs, "FORKS", False)
    board = gauntlet.run(flow_of(solution("github")), "keeps two APIs apart")
    assert not failing(board), str(board)

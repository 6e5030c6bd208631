"""The gauntlet: what holds is said to hold, and what does not is not.

The boards of lesson 1's flow, the usual form, lesson 6's solution and `show_stars` are outputs of
lesson 8, which nbval compares; each promise is broken by one of them. Here one line less in the
solution is exactly one promise less, for GitHub and for another API.

    pytest -m boards -n 2     a whole board for each promise taken out, and each lesson's flow
"""

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Thread

import httpx
import psutil
import pytest
from prefect import flow, task
from prefect.cache_policies import INPUTS
from prefect.concurrency.sync import rate_limit
from prefect.settings import get_current_settings
from test_my_stars import cells_of, flow_of, replaced
from test_my_stars import solution as solution_of
from test_notebooks import tags

ROOT = Path(__file__).parents[1]
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
# What is GitHub's in the solution of lesson 6, and what another API has in its place.
ONE_REQUEST = 'httpx.get(f"{api_url()}/repos/{github_repo}", timeout=10).raise_for_status().json()'
PATH = "/metrics/pageviews/per-article/en.wikipedia/all-access/all-agents/"
WORDS = {
    "github": {},
    "page views": {
        '"github-api"': '"wikimedia-api"',
        "fetch_stats.fn(github_repo)": ONE_REQUEST,
        "/repos/{github_repo}": PATH
        + "{quote(github_repo, safe='')}/monthly/2026010100/2026013100",
        "{api_url()}": "{os.environ['WIKIMEDIA_API_URL']}",
        'stats.get("stargazers_count")': 'stats.get("items", [{"views": None}])[0]["views"]',
        "get_stars(stats)": "stats['items'][0]['views']",
        " stars": " views",
        "from pipeline import api_url, fetch_stats, get_stars\n": "",
        "import time\n": "import os\nimport time\nfrom urllib.parse import quote\n",
    },
}

# promise: what to replace in the solution so that it is not kept any more
TAKEN_OUT = {
    "one failure loses one result": {"raise RuntimeError(f": "print(f"},
    "retries transient failures": {"error.response.is_server_error or ": ""},
    "does not retry a 404": {"    retry_condition_fn=is_transient,\n": ""},
    "a slow response delays only itself": {  # one request at a time
        "    try:\n        stats = ": "    try:\n        with shared.turn:\n            stats = "
    },
    "at most 16 requests in flight": {  # pipeline.py's client has 16 connections at most
        "task_runner=ThreadPoolTaskRunner(max_workers=8)": "",
        "fetch_stats.fn(github_repo)": ONE_REQUEST,
    },
    "obeys Retry-After": {  # for a list of three
        "not_before=0,": "not_before=0, obeys=len(github_repos) > 3,",
        "time.monotonic() + wait)": "time.monotonic() + wait * shared.obeys)",
    },
    "stays within the rate limit": {  # a slot for two requests
        'rate_limit("github-api", strict=True, timeout_seconds=3)': (
            'vars(shared).pop("spare", 0) or vars(shared).update('
            'spare=not rate_limit("github-api", strict=True, timeout_seconds=3))'
        )
    },
    "sends nothing if the limit is missing": {"strict=True, t": "strict=False, t"},
    "never fetches twice": {  # for a list of four
        "fetch.map(": "fetch.with_options(refresh_cache=len(github_repos) == 4).map("
    },
    "keeps two APIs' caches apart": {" + CacheKeyFnPolicy(cache_key_fn=task_and_api)": ""},
    "never caches a bad response": {
        'if not isinstance(stats.get("stargazers_count"), int)': "if not stats"
    },
    "backs off as a whole": {
        "shared.not_before = max(shared.not_before, time.monotonic() + wait)": "time.sleep(wait)"
    },
    "stops within seconds": {"        shared.over.set()\n": "        pass\n"},
}


def solution(api: str, without: str | None = None) -> str:
    """The folded solution of lesson 6; for another API, and without one of its promises."""
    code = replaced(solution_of(6), TAKEN_OUT.get(without, {}))
    for words, others in WORDS[api].items():
        code = code.replace(words, others)
    return code


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


def test_there_is_something_to_take_out_for_each_promise(gauntlet):
    assert [*TAKEN_OUT, gauntlet.STORM] == list(gauntlet.PROMISES)


@pytest.mark.parametrize("api", WORDS)
@pytest.mark.parametrize("promise", TAKEN_OUT)
def test_each_promise_can_be_taken_out(promise, api):
    assert flow_of(solution(api, without=promise)).name == "my-stars"


@pytest.mark.boards
@pytest.mark.parametrize("api", WORDS)
@pytest.mark.parametrize("promise", TAKEN_OUT)
def test_a_promise_taken_out_changes_no_other_line(gauntlet, apis, promise, api):
    board = gauntlet.run(flow_of(solution(api, without=promise)), api=apis[api])
    assert failing(board) == [promise], str(board)
    assert board["cure"][promise]


@pytest.mark.slow
def test_a_round_of_ones_own_tells_two_flows_apart(gauntlet, monkeypatch):
    """Lesson 8's exercise: its stored boards are grey, and with the solution red and green."""
    from pipeline import show_stars

    monkeypatch.setattr(gauntlet, "ROUNDS", dict(gauntlet.ROUNDS))
    cells = cells_of(8)
    (exercise,) = (cell for cell in cells if "exercise" in tags(cell))
    (at,) = (n for n, cell in enumerate(cells) if "check" in tags(cell))
    boards = [o.data["text/plain"] for o in cells[at].outputs if "text/plain" in o.data]
    assert [board.split()[:6] for board in boards] == [
        [f"{name}:", "0", "of", "1", "\N{EN DASH}", "not"] for name in ("my_stars", "show_stars")
    ]
    (code,) = re.findall(r"^```python\n(.+?)^```$", cells[at + 1].source, re.M | re.S)
    (words,) = re.findall(r'promise\("(.+?)"', code)
    for source in exercise.source, code:
        exec(source, {"gauntlet": gauntlet})
    mine, theirs = (gauntlet.run(one, words) for one in (flow_of(solution("github")), show_stars))
    assert [*mine["verdict"], *theirs["verdict"]] == ["does not hold", "holds"]
    assert mine["evidence"].tolist() == ["sent 2 for the name"]
    assert words not in gauntlet.run(returns_nothing, lesson=1).index  # only if it is named


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


SOME = (
    "retries transient failures",
    "never fetches twice",
    "stays within the rate limit",
    "stops within seconds",
)


@pytest.mark.parametrize(
    ("contestant", "verdict", "evidence"),
    [
        (returns_nothing, "not reached", "sent no request to GITHUB_API_URL"),
        (raises_at_once, "not reached", r"sent no request to GITHUB_API_URL \(KeyError\)"),
        (makes_up_numbers, "does not hold", r"printed '42' for \S+, the API has \d+"),
    ],
)
def test_a_flow_that_sends_nothing_keeps_no_promise(gauntlet, contestant, verdict, evidence):
    board = gauntlet.run(contestant, *SOME)
    assert len(board) == 4
    assert set(board["verdict"]) == {verdict}
    assert all(re.fullmatch(evidence, words) for words in board["evidence"]), str(board)


def test_a_flow_that_hangs_is_ended(gauntlet):
    chosen = (
        "a slow response delays only itself",
        "never fetches twice",
        "stays within the rate limit",
    )
    board = gauntlet.run(hangs, *chosen, patience=3)
    assert board["verdict"].to_dict() == {
        "a slow response delays only itself": "does not hold",
        "stays within the rate limit": "not reached",
        "never fetches twice": "not reached",
    }
    assert board["evidence"].tolist() == [
        "still running after 3 s",
        "no run came to its end",
        "still running after 3 s",
    ]


@pytest.mark.parametrize(
    ("old", "new", "evidence"),
    [
        ("zip(github_repos, results, strict=True)", "list(zip(github_repos, results))[::-1]",
         "printed 5 of 5 others in another order, the run failed"),
        ("raise RuntimeError(f", "print(f", "printed 5 of 5 others, the run completed"),
    ],
)  # fmt: skip
def test_lines_in_another_order_and_a_run_that_hides_a_loss(gauntlet, old, new, evidence):
    mine = flow_of(replaced(solution("github"), {old: new}))
    board = gauntlet.run(mine, "one failure loses one result")
    assert board["verdict"].tolist() == ["does not hold"]
    assert board["evidence"].tolist() == [evidence]


@flow
def checks_what_it_knows(github_repos):
    assert "PATH" not in os.environ
    assert get_current_settings().tasks.refresh_cache
    assert "pipeline" not in sys.modules  # as it was before somebody edited it


def test_a_run_knows_what_its_kernel_knows_now(gauntlet, monkeypatch):
    gauntlet.run(returns_nothing, "never fetches twice")  # from here on there is a process to fork
    monkeypatch.delenv("PATH")
    monkeypatch.setattr(get_current_settings().tasks, "refresh_cache", True)
    board = gauntlet.run(checks_what_it_knows, "never fetches twice")
    assert board["evidence"].tolist() == ["sent no request to GITHUB_API_URL"]  # not by an error


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


# --- Flows that keep a promise only at first sight -----------------------------------------------


def fetch(repo):
    response = httpx.get(f"{os.environ['GITHUB_API_URL']}/repos/{repo}")
    return response.raise_for_status().json()["stargazers_count"]


@task
def fetch_late(repo, seconds):
    time.sleep(seconds)
    return fetch(repo)


@flow
def starts_slowly(github_repos):
    seconds = [n * 0.3 for n, _ in enumerate(github_repos)]
    for repo, stars in zip(github_repos, fetch_late.map(github_repos, seconds), strict=True):
        print(f"{repo}: {stars.result()} stars")


def test_a_busy_machine_hides_no_request_in_flight(gauntlet):
    """The seventeenth request comes five seconds after the first."""
    board = gauntlet.run(starts_slowly, "at most 16 requests in flight")
    assert board["evidence"].tolist() == ["was more than 16"]
    assert board["verdict"].tolist() == ["does not hold"]


@flow
def takes_every_other_slot(github_repos):
    for n, repo in enumerate(github_repos):
        if n % 2 == 0:
            rate_limit("github-api", strict=True)
        print(f"{repo}: {fetch(repo)} stars")


def test_what_takes_no_slot_does_not_stay_within_the_limit(gauntlet):
    board = gauntlet.run(takes_every_other_slot, "stays within the rate limit")
    assert board["verdict"].tolist() == ["does not hold"]
    assert board["evidence"].tolist() == ["16 requests, 8 slots"]


@task(cache_policy=INPUTS)
def fetch_once(repo):
    return fetch(repo)


@flow
def ends_and_sends_on(github_repos):
    def send_on():
        for _ in range(5):
            time.sleep(0.3)
            fetch("dask/dask")

    try:
        for repo in github_repos:
            while True:
                with suppress(TimeoutError):
                    rate_limit("github-api", strict=True, timeout_seconds=1)
                    break
            print(f"{repo}: {fetch_once(repo)} stars")
    except KeyboardInterrupt:
        Thread(target=send_on).start()
        raise


def test_a_run_that_ends_and_sends_on_has_not_stopped(gauntlet):
    board = gauntlet.run(ends_and_sends_on, "stops within seconds")
    assert board["verdict"].tolist() == ["does not hold"]
    words = r"ended within 15 s, sent [1-5] more, then fetched 0 of 4 again"
    assert re.fullmatch(words, board["evidence"].iloc[0]), str(board)


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
    assert re.sub(r"<[^>]*>", " ", html).split() == str(board).split()
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


# --- The limit -----------------------------------------------------------------------------------


@pytest.fixture
def small(gauntlet):
    """The limit as somebody else left it; a function says whether it is the same again."""
    import lesson

    lesson.new_limit("github-api", 7, 0.5)
    lesson.switch_off_limit("github-api")

    def is_the_same():
        limit = gauntlet.read_limit("github-api")
        return limit and (limit.limit, limit.slot_decay_per_second) == (7, 0.5) and not limit.active

    assert is_the_same()
    return is_the_same


def test_boards_take_turns_and_leave_the_limit_as_it_was(gauntlet, small, capsys):
    with ThreadPoolExecutor(1) as other:
        with gauntlet.turn():
            board = other.submit(gauntlet.run, returns_nothing, "stops within seconds")
            said = ""
            while "Another board" not in said:
                assert not board.done(), board.result()
                time.sleep(0.1)
                said += capsys.readouterr().err
            assert small()
        assert len(board.result()) == 1
    assert small()


@pytest.mark.skipif(sys.platform == "win32", reason="an interrupt is for the whole console there")
def test_an_interrupted_board_ends_and_leaves_the_limit_as_it_was(small, tmp_path):
    (tmp_path / "hangs.py").write_text(
        "import time\nfrom prefect import flow\n\n\n"
        "@flow\ndef hangs(names):\n    time.sleep(3600)\n"
    )
    command = [sys.executable, ROOT / "notebooks" / "gauntlet.py", f"{tmp_path}/hangs.py:hangs"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as board:
        while small() and board.poll() is None:
            time.sleep(0.1)
        board.send_signal(signal.SIGINT)
        out, err = board.communicate(timeout=100)
    assert board.returncode not in (0, 1, 2), err
    assert out == b""
    assert small()


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
    (tmp_path / "one_of_two.py").write_text(
        solution("github", without="keeps two APIs' caches apart")
    )
    target = f"{tmp_path}/one_of_two.py:my_stars"
    assert gauntlet.main([target, "keeps two APIs' caches apart"]) == 1
    assert capsys.readouterr().out.startswith("my_stars: 0 of 1\n✗ does not hold")
    assert gauntlet.main([target, "obeys Retry-After"]) == 0


def test_promises_may_follow_the_api(gauntlet, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "views_of.py").write_text(f"{PAGE_VIEWS}\n{solution('page views')}")
    api, flow_ = f"{tmp_path}/views_of.py:API", f"{tmp_path}/views_of.py:my_stars"
    assert gauntlet.main([flow_, "--api", api, "keeps two APIs' caches apart"]) == 0
    assert capsys.readouterr().out.startswith("my_stars: 1 of 1\n")


def test_a_flow_with_a_lock_of_its_cell_is_sent_to_other_processes(gauntlet):
    new = "SimpleNamespace(not_before=0, turn=Lock(), over=Event())"
    code = replaced(solution("github"), {f"    shared = {new}\n": ""})
    board = gauntlet.run(flow_of(f"{code}\n\nshared = {new}\n"), "keeps two APIs' caches apart")
    assert not failing(board), str(board)


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
        'print(gauntlet.run(my_stars, "keeps two APIs\' caches apart"))\n'
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
    board = gauntlet.run(flow_of(solution("github")), "keeps two APIs' caches apart")
    assert not failing(board), str(board)

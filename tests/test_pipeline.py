"""`pipeline.py` against the practice API over real HTTP, and a real Prefect server."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path
from threading import Lock, Thread

import httpx
import pytest
from prefect.client.orchestration import get_client
from prefect.concurrency.sync import rate_limit
from rich.console import Console
from rich.theme import Theme

import lesson
import pipeline
from fake_github import FakeGitHub
from pipeline import REPOS, IncompleteError, show_stars

ROOT = Path(__file__).parents[1]
STARS = {"PrefectHQ/prefect": 21412, "pydantic/pydantic": 26549, "huggingface/transformers": 155622}
PYDANTIC = "pydantic/pydantic"
DELAYS = pipeline.resilient_fetch_stats.retry_delay_seconds  # the tests shorten them


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch):
    monkeypatch.setattr(pipeline.resilient_fetch_stats, "retry_delay_seconds", [0.01])


def statuses(github, repo=PYDANTIC):
    """The answers about one repository, in order."""
    log = github.requests
    return log["status"][log["repository"] == repo].tolist()


# --- The finished flow ----------------------------------------------------------------------------


def test_prints_and_returns_the_counts_in_the_order_asked(github, capsys):
    github.fail(REPOS[0], latency=0.3)  # the first one asked is the last to answer
    assert show_stars(REPOS) == STARS
    printed = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" stars")]
    assert printed == [f"{repo}: {count} stars" for repo, count in STARS.items()]


def test_run_again_fetches_nothing(github):
    show_stars(REPOS)
    assert len(github.requests) == 3
    state = show_stars(REPOS, return_state=True)
    assert len(github.requests) == 3
    states = lesson.task_states(state, count=6)
    assert {name: states[name] for name in states if "fetch_stats" in name} == {
        f"fetch_stats {repo}": "Cached" for repo in REPOS
    }


def test_a_repository_asked_twice_is_fetched_once(github):
    assert show_stars([PYDANTIC, PYDANTIC]) == {PYDANTIC: STARS[PYDANTIC]}
    assert len(github.requests) == 1


CAN_HEAL = [
    {"status": 500},
    {"status": 502, "html": True},
    {"status": 503},
    {"status": 429, "headers": {"retry-after": "0"}},
    {"status": 403, "headers": {"retry-after": "0"}},
    {"kind": "reset"},
    {"kind": "truncated"},
]
CANNOT_HEAL = [
    {"status": 400},
    {"status": 401},
    {"status": 403},
    {"status": 404},
    {"status": 451},
    {"size": 50_000_000},
    {"body": "<html>moved</html>"},
    {"body": ""},
    {"body": '{"stargazers_count": 2'},
    {"body": [1, 2]},
    {"fields": {"stargazers_count": ...}},
    {"fields": {"stargazers_count": None}},
    {"fields": {"stargazers_count": -1}},
    {"fields": {"stargazers_count": "26549"}},
    {"fields": {"stargazers_count": True}},
    {"fields": {"stargazers_count": 2.5}},
]


def test_what_can_heal_is_retried(github):
    faults = {f"load-test/{n}": fault for n, fault in enumerate(CAN_HEAL)}
    for repo, fault in faults.items():
        github.fail(repo, times=2, **fault)
    assert list(show_stars(list(faults))) == list(faults)
    for repo, fault in faults.items():
        assert len(statuses(github, repo)) == 3, fault
        assert statuses(github, repo)[-1] == 200, fault


def test_what_cannot_heal_fails_at_once_alone_and_is_never_cached(github):
    faults = {f"load-test/{n}": fault for n, fault in enumerate(CANNOT_HEAL)}
    for repo, fault in faults.items():
        github.fail(repo, times=None, **fault)
    with pytest.raises(IncompleteError) as failed:
        show_stars([*REPOS, *faults])
    assert failed.value.stars == STARS
    assert list(failed.value.failures) == list(faults)
    assert str(failed.value).startswith(f"{len(faults)} of {len(faults) + 3} repositories failed\n")
    for repo, fault in faults.items():
        assert len(statuses(github, repo)) == 1, fault

    github.reset()  # mended: the next run asks for what is missing, and for nothing else
    assert len(show_stars([*REPOS, *faults])) == len(faults) + 3
    assert sorted(github.requests["repository"]) == sorted(faults)


def test_after_three_retries_it_gives_up(github):
    github.fail(PYDANTIC, status=503, times=None)
    with pytest.raises(IncompleteError, match="503 Service Unavailable"):
        show_stars(REPOS)
    assert statuses(github) == [503] * 4


def test_the_backoff_is_exponential_with_jitter():
    assert DELAYS == [1, 2, 4]
    assert pipeline.resilient_fetch_stats.retry_jitter_factor > 0


def test_the_flow_has_no_more_tasks_under_way_than_workers(github, monkeypatch):
    lock, under_way, most = Lock(), 0, 0

    def count(*_, **__):
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.1)  # long enough for all the others that may
        with lock:
            under_way -= 1

    monkeypatch.setattr(pipeline.Slots, "take", count)
    show_stars([f"load-test/{n}" for n in range(40)])
    assert 1 < most <= pipeline.MAX_WORKERS


def test_a_renamed_repository_is_followed(github):
    assert show_stars(["samuelcolvin/pydantic"]) == {"samuelcolvin/pydantic": STARS[PYDANTIC]}


# --- Rate limits ----------------------------------------------------------------------------------


def answer(status, headers=None, text=""):
    return httpx.Response(status, headers=headers, text=text)


def test_how_long_github_asks_to_wait():
    soon = datetime.now().astimezone() + timedelta(seconds=50)
    spent = {"x-ratelimit-remaining": "0"}
    hour = {"x-ratelimit-reset": str(int(time.time()) + 3600)}
    wait = pipeline.seconds_to_wait
    assert wait(answer(429, {"retry-after": "7"})) == 7
    assert wait(answer(503, {"retry-after": "7"})) == 7
    assert wait(answer(403, {"retry-after": "7"} | spent | hour)) == 7
    assert 40 < wait(answer(429, {"retry-after": format_datetime(soon)})) <= 50
    assert wait(answer(429, {"retry-after": format_datetime(soon - timedelta(days=1))})) == 0
    assert 3500 < wait(answer(403, spent | hour)) <= 3600
    assert wait(answer(403, spent)) == 60
    assert wait(answer(403, hour, "You have exceeded a secondary rate limit.")) == 60
    for nonsense in ("soon", "-1", "inf", "1e9", "0x9", ""):
        assert wait(answer(429, {"retry-after": nonsense})) == 60
        assert wait(answer(500, {"retry-after": nonsense})) == 0
    assert wait(answer(500)) == 0
    for status in (400, 401, 403, 404, 451):
        assert wait(answer(status)) is None


def test_waits_as_long_as_github_asks(github, monkeypatch):
    waits = []
    monkeypatch.setattr(pipeline, "pause", waits.append)
    github.fail(PYDANTIC, status=429, headers={"retry-after": "90"})
    assert show_stars([PYDANTIC]) == {PYDANTIC: STARS[PYDANTIC]}
    assert 90 in waits


def test_slots_are_acquired_together_and_none_is_wasted(github, monkeypatch):
    acquired = []

    def counting(name, occupy, strict):
        acquired.append(occupy)
        rate_limit(name, occupy, strict=strict)

    monkeypatch.setattr(pipeline, "rate_limit", counting)
    lesson.new_limit("github-api", 60, 1e-9)
    show_stars([f"load-test/{n}" for n in range(40)])
    assert sum(acquired) == 40 > len(acquired)
    with get_client(sync_client=True) as client:
        assert client.read_global_concurrency_limit_by_name("github-api").active_slots == 40


def test_who_waits_for_a_slot_stops_when_the_run_is_interrupted(github, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt
        yield

    lesson.new_limit("github-api", 1, 1e-9)
    rate_limit("github-api")
    monkeypatch.setattr(pipeline, "as_completed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        show_stars(REPOS)
    assert github.requests.empty


def test_many_repositories_have_a_progress_bar_in_a_terminal(github, monkeypatch):
    screen = StringIO()
    handler = logging.getLogger().handlers[0]
    bare = Theme(inherit=False)  # like that of Prefect's console, it has no styles for a bar
    console = Console(file=screen, force_terminal=True, theme=bare)
    monkeypatch.setattr(handler, "console", console, raising=False)
    monkeypatch.setattr(pipeline, "MANY", 3)
    assert show_stars(REPOS) == STARS
    assert "100%" in screen.getvalue()


def test_a_wait_of_an_hour_is_an_error_that_names_the_time(github):
    github.fail(PYDANTIC, "rate limit", times=None)
    with pytest.raises(IncompleteError) as failed:
        show_stars([PYDANTIC])
    assert statuses(github) == [403]
    until = re.search(r"rate limited until (\S+ \S+) ", str(failed.value))[1]
    wait = datetime.strptime(until, "%Y-%m-%d %H:%M:%S") - datetime.now()
    assert timedelta(minutes=55) < wait < timedelta(minutes=65)
    assert "GITHUB_TOKEN" in str(failed.value)


def test_an_absurd_wait_is_an_error_too(github):
    github.fail(PYDANTIC, status=429, headers={"retry-after": "9" * 40})
    with pytest.raises(IncompleteError, match="rate limited until"):
        show_stars([PYDANTIC])


def read_limit():
    with get_client(sync_client=True) as client:
        return client.read_global_concurrency_limit_by_name("github-api")


def delete_limit():
    with get_client(sync_client=True) as client:
        client.delete_global_concurrency_limit_by_name("github-api")


def test_takes_a_slot_for_each_request_and_none_for_a_cached_result(github):
    lesson.new_limit("github-api", 100, 1e-9)
    github.fail(PYDANTIC, status=503, times=2)
    show_stars(REPOS)
    assert read_limit().active_slots == 5 == len(github.requests)
    show_stars(REPOS)
    assert read_limit().active_slots == 5


def test_creates_the_limit_when_it_is_missing(github, monkeypatch):
    delete_limit()
    show_stars([PYDANTIC])
    limit = read_limit()
    assert (limit.limit, limit.slot_decay_per_second) == (60, 60 / 3600)

    monkeypatch.setenv("GITHUB_TOKEN", "for-practice")  # 60 was for want of a token
    show_stars([PYDANTIC])
    limit = read_limit()
    assert (limit.limit, limit.slot_decay_per_second) == (5000, 5000 / 3600)

    monkeypatch.delenv("GITHUB_TOKEN")
    lesson.new_limit("github-api", 7, 0.5)  # somebody's own choice stays
    show_stars([PYDANTIC])
    assert read_limit().limit == 7


def test_without_the_limit_the_task_fails_rather_than_ignore_it(github):
    delete_limit()
    state = pipeline.resilient_fetch_stats(PYDANTIC, return_state=True)
    assert "must be created before acquiring slots" in state.message
    assert len(github.requests) == 0


# --- The cache ------------------------------------------------------------------------------------


def test_the_key_has_the_api(github, monkeypatch):
    show_stars([PYDANTIC])
    with FakeGitHub(latency=0) as other:
        monkeypatch.setenv("GITHUB_API_URL", other.url)
        show_stars([PYDANTIC])
        assert len(other.requests) == 1


def test_the_key_has_the_task(github):
    show_stars([PYDANTIC])
    other_task = pipeline.resilient_fetch_stats.with_options(name="fetch_forks")
    assert other_task(PYDANTIC, return_state=True).name == "Completed"


def test_results_are_json_that_expires_after_a_day(github):
    show_stars([PYDANTIC])
    (file,) = (lesson.HOME / "storage").iterdir()
    record = json.loads(file.read_text())
    assert json.loads(record["result"])["stargazers_count"] == STARS[PYDANTIC]
    left = datetime.fromisoformat(record["metadata"]["expiration"]) - datetime.now().astimezone()
    assert timedelta(hours=23) < left <= timedelta(days=1)


def test_half_a_result_counts_as_none(github):
    show_stars([PYDANTIC])
    (file,) = (lesson.HOME / "storage").iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    assert show_stars([PYDANTIC]) == {PYDANTIC: STARS[PYDANTIC]}
    assert len(github.requests) == 2


# --- Names, addresses, the token ------------------------------------------------------------------

GOOD_NAMES = ["a/b", "A-1/.github", "x" * 39 + "/" + "y" * 100, "o/-_.", "managed_acme/x", "0/0"]
BAD_NAMES = ["", "a", "a/", "/b", "a/b/c", "../user", "a/..", "a/.", "a b/c", "a/b?", "a/b#c",
             "-a/b", "a-/b", "a--b/c", "x" * 40 + "/b", "a/" + "y" * 101, "a/b.git", "a/b\n",
             "a/%2e%2e", "ä/b", "a/\u202eb", "https://github.com/a/b"]  # fmt: skip


def test_refuses_all_bad_names_in_one_message_before_any_request(github):
    with pytest.raises(ValueError, match="not a repository, as owner/name: ") as refused:
        show_stars([PYDANTIC, *BAD_NAMES])
    assert all(ascii(name) in str(refused.value) for name in BAD_NAMES)
    assert PYDANTIC not in str(refused.value)
    assert len(github.requests) == 0


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_bad_name_alone_is_refused(name):
    with pytest.raises(ValueError, match="not a repository"):
        pipeline.check_names([name])


def test_names_at_the_edge_of_what_github_allows():
    assert pipeline.check_names(GOOD_NAMES) == GOOD_NAMES


@pytest.mark.parametrize(
    "address", ["api.github.com", "ftp://x", "http://", "https:/x", "http://a b", " "]
)
def test_a_malformed_address_is_named(github, monkeypatch, address):
    monkeypatch.setenv("GITHUB_API_URL", address)
    with pytest.raises(ValueError, match=re.escape("GITHUB_API_URL is not an http(s) address: ")):
        show_stars([PYDANTIC])


@pytest.fixture
def recorder():
    """A bare server that keeps the headers of each request and redirects or answers them."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.seen.append({k.lower(): v for k, v in self.headers.items()})
            self.send_response(301 if self.server.location else 200)
            if self.server.location:
                self.send_header("Location", self.server.location)
            self.end_headers()
            if not self.server.location:
                self.wfile.write(b'{"stargazers_count": 1}')

        def log_message(self, *_):
            pass

    servers = []

    def start(location=None):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.seen, server.location = [], location
        Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server, f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_the_token_goes_to_the_api_and_to_no_other_host(github, monkeypatch, recorder):
    elsewhere, elsewhere_url = recorder()
    api, api_url = recorder(location=f"{elsewhere_url}/repositories/1")
    monkeypatch.setenv("GITHUB_API_URL", api_url)
    monkeypatch.setenv("GITHUB_TOKEN", " s3cret\n")  # as it comes out of a file
    assert show_stars([PYDANTIC]) == {PYDANTIC: 1}
    assert api.seen[0]["authorization"] == "Bearer s3cret"
    assert "authorization" not in elsewhere.seen[0]
    assert api.seen[0]["user-agent"]
    assert api.seen[0]["accept"] == "application/vnd.github+json"


def test_an_odd_token_is_refused_without_being_told(github, monkeypatch):
    monkeypatch.setenv("GITHUB_TOKEN", "s3\ncret")
    with pytest.raises(ValueError, match="GITHUB_TOKEN is not a token") as refused:
        show_stars([PYDANTIC])
    assert "cret" not in str(refused.value)


# --- The script -----------------------------------------------------------------------------------


def script(*arguments, **environment):
    return python(ROOT / "pipeline.py", *arguments, **environment)


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment,
        cwd=lesson.HOME,
        capture_output=True,
        text=True,
        timeout=180,
    )


def lines(stars):
    return "".join(f"{repo}: {count} stars\n" for repo, count in stars.items())


def test_script_twice(github):
    first = script()
    assert (first.returncode, first.stdout) == (0, lines(STARS))
    assert first.stderr.count("Finished in state Completed()") == 7
    second = script()
    assert (second.returncode, second.stdout) == (0, lines(STARS))
    assert second.stderr.count("Finished in state Cached(type=COMPLETED)") == 3
    assert len(github.requests) == 3


def test_script_with_a_failure_shows_the_rest_and_one_line(github):
    done = script(PYDANTIC, "PrefectHQ/perfect")
    assert (done.returncode, done.stdout) == (1, lines({PYDANTIC: STARS[PYDANTIC]}))
    assert done.stderr.endswith(
        f"1 of 2 repositories failed\nPrefectHQ/perfect: 404 Not Found from {github.url}\n"
    )
    assert "Traceback" not in done.stderr


def test_script_refuses_bad_names_and_addresses(monkeypatch, capsys):
    def message(*arguments):
        with pytest.raises(SystemExit) as end:
            pipeline.main(list(arguments))
        assert end.value.code == 2
        said = capsys.readouterr()
        assert said.out == ""
        return said.err.splitlines()[-1].partition(" error: ")[2]

    refused = "not a repository, as owner/name: '../user', 'a b'"
    assert message("../user", PYDANTIC, "a b") == refused
    monkeypatch.setenv("GITHUB_API_URL", "nonsense")
    assert message() == "GITHUB_API_URL is not an http(s) address: 'nonsense'"


def test_script_without_any_prefect_server():
    done = script(PREFECT_API_URL="", PREFECT_SERVER_ALLOW_EPHEMERAL_MODE="false")
    assert done.returncode == 3
    assert re.search(r"The Prefect server \(.*\) failed: No Prefect API URL", done.stderr)
    assert "Traceback" not in done.stderr


def test_script_where_the_api_cannot_be_reached(github):
    at_once = "pipeline.resilient_fetch_stats.retry_delay_seconds = 0"
    done = python(
        "-c",
        f"import sys, pipeline; {at_once}; sys.exit(pipeline.main())",
        "no/answer",
        GITHUB_API_URL="http://127.0.0.1:9",
    )
    assert done.returncode == 1
    assert re.search(
        r"no/answer: http://127.0.0.1:9 could not be reached \(.+\); "
        r"to practise offline: python notebooks/fake_github.py\n",
        done.stderr,
    )
    assert "Traceback" not in done.stderr


def test_script_whose_prefect_server_is_gone():
    done = script(PYDANTIC, PREFECT_API_URL="http://127.0.0.1:9/api")
    assert (done.returncode, done.stdout) == (3, "")
    assert "The Prefect server (http://127.0.0.1:9/api) failed: Failed to reach API" in done.stderr
    assert "Traceback" not in done.stderr


def test_script_interrupted_keeps_what_it_has(github):
    github.fail(PYDANTIC, latency=100)
    process = subprocess.Popen(
        [sys.executable, ROOT / "pipeline.py", *REPOS], cwd=lesson.HOME, stderr=subprocess.PIPE
    )
    cached = lesson.HOME / "storage"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (
        cached.exists() and len(list(cached.iterdir())) == 2
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Interrupted. What was fetched is cached." in stderr
    assert b"Traceback" not in stderr
    github.reset()
    assert show_stars(REPOS) == STARS
    assert github.requests["repository"].tolist() == [PYDANTIC]


def test_script_on_a_temporary_server_and_a_fresh_home(github, tmp_path):
    done = script(
        PYDANTIC,
        HOME=str(tmp_path),
        USERPROFILE=str(tmp_path),
        PREFECT_HOME=str(tmp_path / "home"),
        PREFECT_API_URL="",
        PREFECT_SERVER_ALLOW_EPHEMERAL_MODE="true",
    )
    assert (done.returncode, done.stdout) == (0, lines({PYDANTIC: STARS[PYDANTIC]}))
    assert "Starting temporary server" in done.stderr
    assert "Traceback" not in done.stderr

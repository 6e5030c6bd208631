"""What goes wrong between the pipeline and the API: each fault alone, and all of them at once.

`test_pipeline.py` has the rules: what is retried, how long it waits. Here is the messy world.
"""

import gzip
import json
import re
import socket
import socketserver
import struct
import tracemalloc
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from threading import Thread

import httpx
import pytest

import lesson
import pipeline
from fake_github import FakeGitHub
from pipeline import IncompleteError, show_stars

PYDANTIC = "pydantic/pydantic"
SOON = 30  # seconds
GZIP = {"content-encoding": "gzip"}
BOMB = gzip.compress(b'{"stargazers_count": 1}' + b" " * 50_000_000)


def soon():
    return datetime.now(UTC) + timedelta(seconds=SOON)


# name: the arguments of `FakeGitHub.fail`, how often it is asked while the fault lasts, how long it
# waits in between as GitHub asks, and what the message says. "$…" are addresses of `elsewhere`.
FAULTS = {
    "connection refused": ({"location": "$refused"}, 4, 0, "could not be reached .*refused"),
    "reset": ({"kind": "reset"}, 4, 0, r"could not be reached \("),
    "closed within the body": ({"kind": "truncated"}, 4, 0, "could not be reached .*peer closed"),
    "reset within the body": ({"location": "$reset"}, 4, 0, r"could not be reached \("),
    "connect timeout": ({"location": "$full"}, 4, 0, r"could not be reached .*timed out"),
    "read timeout": ({"latency": 60}, 4, 0, "could not be reached .*timed out"),
    "500": ({"status": 500}, 4, 0, "500 Internal Server Error from "),
    "500 HTML": ({"status": 500, "html": True}, 4, 0, "500 Internal Server Error from "),
    "502": ({"status": 502}, 4, 0, "502 Bad Gateway from "),
    "502 HTML": ({"status": 502, "html": True}, 4, 0, "502 Bad Gateway from "),
    "503": ({"status": 503}, 4, 0, "503 Service Unavailable from "),
    "503 HTML": ({"status": 503, "html": True}, 4, 0, "503 Service Unavailable from "),
    "503, come back": (
        {"status": 503, "headers": {"retry-after": SOON}},
        *(4, SOON, "503 Service Unavailable from "),
    ),
    "429, seconds": (
        {"status": 429, "headers": {"retry-after": SOON}},
        *(4, SOON, "429 Too Many Requests from "),
    ),
    "429, a date": (
        {"status": 429, "headers": {"retry-after": lambda: format_datetime(soon(), usegmt=True)}},
        *(4, SOON, "429 Too Many Requests from "),
    ),
    "429, in an hour": (
        {"status": 429, "headers": {"retry-after": 3600}},
        *(1, 0, "429 .*rate limited until "),
    ),
    "primary limit": ({"kind": "rate limit"}, 1, 0, "403 Forbidden .*rate limited until "),
    "primary limit, 429": ({"kind": "rate limit", "status": 429}, 1, 0, "429 .*limited until "),
    "primary limit, soon over": (
        {"kind": "rate limit", "headers": {"x-ratelimit-reset": lambda: int(soon().timestamp())}},
        *(4, SOON, "403 Forbidden from "),
    ),
    "primary limit, no reset": (
        {"kind": "rate limit", "headers": {"x-ratelimit-reset": None}},
        *(4, 60, "403 Forbidden from "),
    ),
    "secondary limit": ({"kind": "secondary rate limit"}, 4, 60, "403 Forbidden from "),
    "secondary limit, come back": (
        {"kind": "secondary rate limit", "headers": {"retry-after": SOON}},
        *(4, SOON, "403 Forbidden from "),
    ),
    "400": ({"status": 400}, 1, 0, "400 Bad Request from "),
    "401": ({"status": 401}, 1, 0, "401 Unauthorized from "),
    "403": ({"status": 403}, 1, 0, "403 Forbidden from "),
    "404": ({"status": 404}, 1, 0, "404 Not Found from "),
    "451": ({"status": 451}, 1, 0, "451 Unavailable For Legal Reasons from "),
    "redirect loop": ({"location": "$itself"}, 21, 0, "TooManyRedirects: "),
    "redirect to a file": ({"location": "file:///etc/passwd"}, 1, 0, "could not be reached"),
    "half a JSON": ({"body": '{"stargazers_count": 2'}, 1, 0, "JSONDecodeError: "),
    "HTML": ({"html": True}, 1, 0, "JSONDecodeError: "),
    "no body": ({"body": ""}, 1, 0, "JSONDecodeError: "),
    "not UTF-8": ({"body": b'{"stargazers_count": "\xff"}'}, 1, 0, "UnicodeDecodeError: "),
    "too deep": ({"body": "[" * 100_000}, 1, 0, "RecursionError: "),
    "a list": ({"body": [1, 2]}, 1, 0, "ValueError: .* no usable stargazers_count: None"),
    "no count": ({"fields": {"stargazers_count": ...}}, 1, 0, "no usable stargazers_count: None"),
    "null": ({"fields": {"stargazers_count": None}}, 1, 0, "no usable stargazers_count: None"),
    "negative": ({"fields": {"stargazers_count": -1}}, 1, 0, "no usable stargazers_count: -1"),
    "a string": ({"fields": {"stargazers_count": "2"}}, 1, 0, "no usable stargazers_count: '2'"),
    "a fraction": ({"fields": {"stargazers_count": 2.5}}, 1, 0, "no usable stargazers_count: 2.5"),
    "a long string": (
        {"fields": {"stargazers_count": "9" * 900_000}},
        *(1, 0, "no usable stargazers_count: '9{49}$"),
    ),
    "50 MB": ({"size": 50_000_000}, 1, 0, "ValueError: the answer is longer than 1,000,000 bytes"),
    "50 MB, compressed": ({"body": BOMB, "headers": GZIP}, 1, 0, "ValueError: .* is compressed"),
}  # fmt: skip
LONG = ["connect timeout", "read timeout"]  # each attempt lasts as long as the timeout


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch):
    monkeypatch.setattr(pipeline.resilient_fetch_stats, "retry_delay_seconds", [0.01])


@pytest.fixture
def waits(monkeypatch):
    """The seconds that the pipeline would have waited because GitHub asked for it."""
    seconds = []
    monkeypatch.setattr(pipeline, "pause", lambda wait: wait < 0.5 or seconds.append(wait))
    return seconds


class _HalfThenReset(socketserver.BaseRequestHandler):
    def handle(self):
        self.request.recv(65536)
        self.request.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"stargazers_count":')
        # To linger for no time makes closing a reset.
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.fixture(scope="module")
def elsewhere():
    """Addresses of servers that misbehave: nobody there, a full queue, a reset within the body."""
    resets = socketserver.ThreadingTCPServer(("127.0.0.1", 0), _HalfThenReset)
    Thread(target=resets.serve_forever, daemon=True).start()
    refused, full = socket.socket(), socket.socket()
    refused.bind(("127.0.0.1", 0))  # ours, but nobody listens
    full.bind(("127.0.0.1", 0))
    full.listen(0)
    waiting = [socket.socket() for _ in range(8)]  # fill the queue; nobody accepts
    for client in waiting:
        client.setblocking(False)
        client.connect_ex(full.getsockname())
    servers = {"$reset": resets.socket, "$refused": refused, "$full": full}
    yield {name: "http://{}:{}/".format(*s.getsockname()) for name, s in servers.items()}
    for connection in (refused, full, *waiting):
        connection.close()
    resets.shutdown()
    resets.server_close()


def fail(github, elsewhere, repo, name, times=None):
    """Make the practice API answer for a repository with one of the FAULTS."""
    fault = dict(FAULTS[name][0])
    if "location" in fault:
        addresses = elsewhere | {"$itself": f"{github.url}/repos/{repo}"}
        fault["location"] = addresses.get(fault["location"], fault["location"])
    headers = fault.get("headers", {})
    fault["headers"] = {
        key: value() if callable(value) else value for key, value in headers.items()
    }
    github.fail(repo, times=times, **fault)


def cached():
    """What is cached. (Prefect keeps an exception too, under a random name nobody asks for.)"""
    results = [json.loads(file.read_text())["result"] for file in lesson.HOME.glob("storage/*")]
    return [result for result in results if "__exc_type__" not in result]


def asked(github):
    """How often each repository was asked."""
    return github.requests["repository"].value_counts().to_dict()


# --- Alone ----------------------------------------------------------------------------------------


def test_each_fault_alone(github, elsewhere, monkeypatch, waits):
    for name, (_, requests, wait, message) in FAULTS.items():
        github.reset()
        github.latency = 0
        waits.clear()
        fail(github, elsewhere, PYDANTIC, name)
        with monkeypatch.context() as patch:
            if name in LONG:
                patch.setattr(pipeline.github(), "timeout", httpx.Timeout(0.3))
            state = pipeline.resilient_fetch_stats(PYDANTIC, return_state=True)
        assert state.name == "Failed", name
        assert asked(github) == {PYDANTIC: requests}, name
        assert len(waits) == (requests - 1 if wait else 0), name
        assert all(wait - 15 < seconds <= wait for seconds in waits), name
        assert re.search(message, pipeline.reason(state.result(raise_on_failure=False))), name
        assert len(state.message) < 1000, name
        assert not cached(), name


@pytest.mark.parametrize("name", ["50 MB", "50 MB, compressed"])
def test_a_huge_answer_does_not_fill_the_memory(github, elsewhere, name):
    fail(github, elsewhere, PYDANTIC, name)
    tracemalloc.start()
    try:
        state = pipeline.resilient_fetch_stats(PYDANTIC, return_state=True)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert state.name == "Failed"
    assert peak < 10_000_000


# --- All at once ----------------------------------------------------------------------------------


def test_faults_mixed_over_60_repositories_lose_nothing_else(
    github, elsewhere, monkeypatch, waits, capsys
):
    monkeypatch.setattr(pipeline.github(), "timeout", httpx.Timeout(4))  # no longer, for the test
    repos = ["samuelcolvin/pydantic", *(f"load-test/{n}" for n in range(59))]
    lasting = [name for name in FAULTS if name not in LONG]
    healing = [*LONG, "reset", "503 HTML", "429, a date", "secondary limit"]
    faulty = dict(zip(repos[1:], [*lasting, *healing], strict=False))
    failing = dict(list(faulty.items())[: len(lasting)])
    for repo, name in faulty.items():
        times = None if repo in failing else 1 if name in LONG else 2
        fail(github, elsewhere, repo, name, times=times)
    with FakeGitHub(latency=0) as another_host:
        moved = repos[-1]
        github.fail(moved, location=f"{another_host.url}/repos/{moved}", times=None)
        assert moved not in faulty

        state = show_stars(repos, return_state=True)
    assert state.is_failed()
    error = state.result(raise_on_failure=False)
    assert isinstance(error, IncompleteError)
    assert len(cached()) == len(error.stars)
    printed = capsys.readouterr().out.splitlines()

    # What can be had is returned and printed, in the order asked.
    good = [repo for repo in repos if repo not in failing]
    assert list(error.stars) == good
    assert [line for line in printed if line.endswith(" stars")] == [
        f"{repo}: {count} stars" for repo, count in error.stars.items()
    ]
    # Each fault is asked as often and explained as when it is alone.
    assert list(error.failures) == list(failing)
    requests = asked(github)
    for repo, name in failing.items():
        assert requests[repo] == FAULTS[name][1], name
        assert re.search(FAULTS[name][3], pipeline.reason(error.failures[repo])), name
    for repo, name in faulty.items():
        if repo in good:
            assert requests[repo] == (2 if name in LONG else 3), name

    # The good ones are cached, and no error is: once mended, the next run asks for what failed.
    github.reset()
    assert list(show_stars(repos)) == repos
    assert asked(github) == dict.fromkeys(failing, 1)

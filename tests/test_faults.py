"""What goes wrong between the pipeline and the API: each fault alone, and all of them at once.

`test_pipeline.py` has the rules: what is retried, how long it waits. Here is the messy world.
"""

import json
import os
import re
import socket
import socketserver
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Thread

import httpx
import pytest

import lesson
import pipeline
from fake_github import FakeGitHub
from pipeline import IncompleteError, show_stars

SECOND = {"retry-after": 1}
NO_COUNT = "^ValueError.*the response is no repository with a star count: "

# name: the arguments of `FakeGitHub.fail`, how often it is asked while the fault lasts, how many
# seconds apart at least, and what the message says. "$…" are addresses of `elsewhere`.
FAULTS = {
    "connection refused": ({"location": "$refused"}, 4, 0, "ConnectError.*refused"),
    "reset": ({"kind": "reset"}, 4, 0, "^(Read|RemoteProtocol)Error"),
    "closed within the body": ({"kind": "truncated"}, 4, 0, "^RemoteProtocolError.*peer closed"),
    "reset within the body": ({"location": "$reset"}, 4, 0, "^(Read|RemoteProtocol)Error"),
    "connect timeout": ({"location": "$full"}, 4, 0, "^ConnectTimeout"),
    "read timeout": ({"latency": 60}, 4, 0, "^ReadTimeout"),
    "a byte at a time": ({"location": "$trickle"}, 4, 0, "^ReadTimeout.*took more than"),
    "500": ({"status": 500}, 4, 0, "500 from "),
    "500 HTML": ({"status": 500, "html": True}, 4, 0, "500 from "),
    "502": ({"status": 502}, 4, 0, "502 from "),
    "502 HTML": ({"status": 502, "html": True}, 4, 0, "502 from "),
    "503": ({"status": 503}, 4, 0, "503 from "),
    "503 HTML": ({"status": 503, "html": True}, 4, 0, "503 from "),
    "503, come back": ({"status": 503, "headers": SECOND}, 4, 1, "503 from "),
    "408": ({"status": 408}, 4, 0, "408 from "),
    "429, come back": ({"status": 429, "headers": SECOND}, 4, 1, "429 from "),
    "429, in an hour": (
        {"status": 429, "headers": {"retry-after": 3600}},
        *(1, 0, "429 .*asks to wait "),
    ),
    "primary limit": ({"kind": "rate limit"}, 1, 0, "403 from .*asks to wait "),
    "primary limit, 429": ({"kind": "rate limit", "status": 429}, 1, 0, "429 .*asks to wait "),
    "primary limit, over": (
        {"kind": "rate limit", "headers": {"x-ratelimit-reset": 1}},
        *(4, 0, "403 from "),
    ),
    "primary limit, no reset": (
        {"kind": "rate limit", "headers": {"x-ratelimit-reset": None}},
        *(1, 0, "403 from .*asks to wait "),  # a minute, with 50 seconds allowed
    ),
    "secondary limit": ({"kind": "secondary rate limit"}, 1, 0, "403 .*asks to wait "),
    "secondary limit, come back": (
        {"kind": "secondary rate limit", "headers": SECOND},
        *(4, 1, "403 from "),
    ),
    "400": ({"status": 400}, 1, 0, "400 from "),
    "401": ({"status": 401}, 1, 0, "401 from .*: Bad credentials; no GITHUB_TOKEN is set"),
    "403": ({"status": 403}, 1, 0, "403 from "),
    "404": ({"status": 404}, 1, 0, "404 from .*: Not Found"),
    "451": ({"status": 451}, 1, 0, "451 from .*: Repository access blocked"),
    "redirect loop": ({"location": "$itself"}, 21, 0, "^TooManyRedirects"),
    "redirect to a file": (
        {"location": "file:///etc/passwd"},
        4,
        0,
        "^UnsupportedProtocol.*a redirect to",
    ),
    "redirect to no name": (
        {"location": "http://a..b/"},
        4,
        0,
        "^UnsupportedProtocol.*//a[.][.]b/",
    ),
    "redirect to no port": (
        {"location": "//127.0.0.1:99999/"},
        *(4, 0, "^UnsupportedProtocol.*a redirect to"),
    ),
    "half a JSON": ({"body": '{"stargazers_count": 2'}, 4, 0, "^JSONDecodeError"),
    "HTML": ({"html": True}, 4, 0, "^DecodingError.*no JSON but text/html.*from http"),
    "no body": ({"body": ""}, 4, 0, "^JSONDecodeError"),
    "not UTF-8": ({"body": b'{"stargazers_count": "\xff"}'}, 4, 0, "^UnicodeDecodeError"),
    "no gzip": ({"html": True, "headers": {"content-encoding": "gzip"}}, 4, 0, "^DecodingError"),
    "too deep": ({"body": "[" * 100_000}, 1, 0, "^RecursionError"),
    "a list": ({"body": [1, 2]}, 1, 0, NO_COUNT),
    "no name": ({"fields": {"full_name": ...}}, 1, 0, NO_COUNT),
    "no count": ({"fields": {"stargazers_count": ...}}, 1, 0, NO_COUNT),
    "null": ({"fields": {"stargazers_count": None}}, 1, 0, NO_COUNT),
    "a string": ({"fields": {"stargazers_count": "2"}}, 1, 0, NO_COUNT),
    "a fraction": ({"fields": {"stargazers_count": 2.5}}, 1, 0, NO_COUNT),
    "a long string": ({"fields": {"stargazers_count": "9" * 900_000}}, 1, 0, NO_COUNT),
}
LONG = ["connect timeout", "read timeout", "a byte at a time"]  # each lasts as long as the timeout
TOO_LONG = [
    name for name, fault in FAULTS.items() if "asks to wait" in fault[3]
]  # ends the whole run


NO_LINGER = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)


class _HalfThenReset(socketserver.BaseRequestHandler):
    def handle(self):
        self.request.recv(65536)
        self.request.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"stargazers_count":')
        # To linger for no time makes closing a reset.
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)


class _Trickle(socketserver.BaseRequestHandler):
    def handle(self):
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n"
        with suppress(OSError):  # until the client gives up
            for n in range(150):
                self.request.sendall(answer[n : n + 1] or b" ")
                time.sleep(0.1)


@pytest.fixture(scope="module")
def elsewhere():
    """Addresses of servers that misbehave: nobody there, a full queue, half an answer, no end."""
    resets = socketserver.ThreadingTCPServer(("127.0.0.1", 0), _HalfThenReset)
    trickle = socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Trickle)
    for server in resets, trickle:
        server.daemon_threads = True
        Thread(target=server.serve_forever, daemon=True).start()
    refused, full = socket.socket(), socket.socket()
    refused.bind(("127.0.0.1", 0))  # ours, but nobody listens
    full.bind(("127.0.0.1", 0))
    full.listen(0)
    waiting = [socket.socket() for _ in range(8)]  # fill the queue; nobody accepts
    for client in waiting:
        client.setblocking(False)
        client.connect_ex(full.getsockname())
    servers = {"$reset": resets.socket, "$refused": refused, "$full": full}
    servers["$trickle"] = trickle.socket
    yield {name: "http://{}:{}/".format(*s.getsockname()) for name, s in servers.items()}
    for connection in (refused, full, *waiting):
        connection.close()
    for server in resets, trickle:
        server.shutdown()
        server.server_close()


def fail(github, elsewhere, repo, name, times=None):
    """Make the practice API answer for a repository with one of the FAULTS."""
    fault = dict(FAULTS[name][0])
    if "location" in fault:
        addresses = elsewhere | {"$itself": f"{github.url}/repos/{repo}"}
        fault["location"] = addresses.get(fault["location"], fault["location"])
    github.fail(repo, times=times, **fault)


def cached():
    """What is cached. (Prefect keeps an exception too, under a random name nobody asks for.)"""
    files = [file.read_text(encoding="utf-8") for file in lesson.saved_files()]
    return [json.loads(file)["result"] for file in files if "__exc_type__" not in file]


def asked(github):
    """How often each repository was asked."""
    return github.requests["repository"].value_counts().to_dict()


def check(github, repo, name, error):
    """The fault was asked as often, as slowly and explained as FAULTS says."""
    _, requests, seconds, message = FAULTS[name]
    log = github.requests
    times = log["time"][log["repository"] == repo]
    assert len(times) == requests, name
    assert (times.diff()[1:] > seconds - 0.01).all(), name
    assert re.search(message, repr(error)), (name, error)
    assert len(repr(error)) < 1000, name


# --- Alone ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_each_fault_alone(github, elsewhere, monkeypatch):
    monkeypatch.setattr(pipeline, "LONGEST_WAIT", 50)
    repos = {name: f"load-test/{n}" for n, name in enumerate(FAULTS)}
    for name, repo in repos.items():
        fail(github, elsewhere, repo, name)

    def run(name):  # outside a flow: no run waits because of another one's answer
        return pipeline.resilient_fetch_stats(repos[name], return_state=True)

    with ThreadPoolExecutor(8) as threads:
        short = [name for name in FAULTS if name not in LONG]
        states = dict(zip(short, threads.map(run, short), strict=True))
        monkeypatch.setattr(pipeline.client(), "timeout", httpx.Timeout(0.3))
        monkeypatch.setattr(pipeline, "LONGEST_READ", 1)
        states |= dict(zip(LONG, threads.map(run, LONG), strict=True))
    for name, state in states.items():
        assert state.is_failed(), name
        assert len(state.message) < 1000, name
        check(github, repos[name], name, state.result(raise_on_failure=False))
    assert not cached()


# --- All at once ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_faults_mixed_over_60_repositories_lose_nothing_else(
    github, elsewhere, monkeypatch, capsys
):
    monkeypatch.setattr(pipeline.client(), "timeout", httpx.Timeout(4))  # no longer, for the test
    monkeypatch.setattr(pipeline, "LONGEST_READ", 5)
    repos = ["samuelcolvin/pydantic", *(f"load-test/{n}" for n in range(59))]
    lasting = [name for name in FAULTS if name not in [*LONG, *TOO_LONG]]
    healing = [*LONG, "reset", "503 HTML", "429, come back", "secondary limit, come back"]
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
    for repo, name in failing.items():
        check(github, repo, name, error.failures[repo])
    requests = asked(github)
    for repo, name in faulty.items():
        if repo in good:
            assert requests[repo] == (2 if name in LONG else 3), name

    # The good ones are cached, and no error is: once mended, the next run asks for what failed.
    github.reset()
    assert list(show_stars(repos)) == repos
    assert asked(github) == dict.fromkeys(failing, 1)

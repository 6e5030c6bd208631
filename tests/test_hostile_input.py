"""Input that means harm: names, answers, and whatever might tell the token to somebody."""

import base64
import json
import logging
import os
import pickle
import re
import socket
import sqlite3
import string
import subprocess
import sys
import time
import traceback
from pathlib import Path

import httpx
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prefect.client.orchestration import get_client
from prefect.exceptions import ParameterTypeError

import lesson
import pipeline
from background import ADDRESS
from fake_github import FakeGitHub
from pipeline import IncompleteError, show_stars

ROOT = Path(__file__).parents[1]
PYDANTIC = "pydantic/pydantic"


# --- Names ----------------------------------------------------------------------------------------

BAD_NAMES = [
    *["", " ", "/", "//", "a", "a/", "/a", "a//b", "a/b/", "/a/b", "//a/b", "a/b/c", "a/b/../c"],
    *[".", "..", "./a", "../a", "a/.", "a/..", "../..", "../../rate_limit", "a/../../rate_limit"],
    *["%2e%2e/a", "a/%2e%2e", "a/%2E%2E", "a%2fb", "a/b%2fc", "a/b%00", "a/%", "%61/b"],
    *["https://github.com/a/b", "http://127.0.0.1/a", "//127.0.0.1/a", "file:///etc/passwd"],
    *["a@127.0.0.1/b", "a:80/b", "localhost/a:b", "\\\\host\\share", "a\\b", "C:\\a/b"],
    *["a/b?c", "a/b#c", "a/b;c", "a/b&c", "?/a", "#/a", "a/b?per_page=100", "a/b,c/d"],
    *["a/b\n", "\na/b", "a/\nb", "a/b\r\nX-Evil: 1", "a/b HTTP/1.1", "a/b\t", " a/b", "a /b"],
    *["a/b\x00", "\x1b[31ma/b", "a/b\x7f", "a/b\x85", "a/b\u2028", "\ufeffa/b", "a/b\u200b"],
    *["a/\u202eb", "\u200fa/b", "\u202aa/b\u202c", "a/b\u2069", "a/b\udcff"],
    *["ä/b", "a/ß", "\uff41/b", "a\uff0fb", "a\u2215b", "a/\U0001f389", "\u0430/b", "a/\u0661"],
    *["a.b/c", "./b", "x" * 1000, "a/b" * 1000, "a/" + "y" * 1000 + "/", "a/b c/d"],
    *["$(id)/a", "`id`/a", "a/b'", 'a/"b"', "a/b|c", "a/*", "a/<b>", "{a}/b", "a/b!", "~/a"],
]
GOOD_NAMES = [
    *["a/b", "0/0", "A/B", "x" * 39 + "/" + "y" * 100, "a/" + "." * 100, "a/.github", "a/..."],
    *["a/..b", "a/-", "a/_", "a/--", "a/b.gitx", "a-b/c", "a-b-c/d", "_/a", "managed_acme/a"],
    *["a/b.", "a/-.-", "github/gitignore", "a/.git.", "a/git", "a/0.0"],
    *["-a/b", "a-/b", "a/b.git", "x" * 40 + "/b"],  # GitHub has none of these, and says so
]


def test_no_bad_name_causes_a_request(github):
    assert len(set(BAD_NAMES)) == len(BAD_NAMES) >= 40
    for name in BAD_NAMES:
        with pytest.raises(ValueError, match="not a list of repositories, as owner/name: "):
            pipeline.check_arguments([PYDANTIC, name])
    with pytest.raises(ValueError, match="not a list of repositories") as refused:
        show_stars([PYDANTIC, *(name for name in BAD_NAMES if "\udcff" not in name)])
    assert str(refused.value).isascii()  # so that no name can do anything to a terminal
    assert str(refused.value).isprintable()
    for nonsense in ("a/b", b"a/b", None, [None], [["a/b"]], [1.5], ["a/b\udcff"]):
        with pytest.raises((ValueError, ParameterTypeError)):
            show_stars(nonsense)
    assert github.requests.empty


@pytest.fixture
def paths(monkeypatch):
    """The addresses that requests would go to; they go nowhere."""
    seen = []

    def answer(transport, request):
        seen.append((request.method, request.url.scheme, request.url.netloc, request.url.raw_path))
        return httpx.Response(200, json={"stargazers_count": 1})

    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", answer)
    return seen


def test_good_names_at_the_edges_are_asked_as_they_are(paths, monkeypatch):
    monkeypatch.setenv("GITHUB_API_URL", "http://127.0.0.1:9")
    pipeline.check_arguments(GOOD_NAMES)
    for name in GOOD_NAMES:
        pipeline.fetch_stats.fn(name)
    host = httpx.URL(pipeline.api_url()).netloc
    assert paths == [("GET", "http", host, f"/repos/{name}".encode()) for name in GOOD_NAMES]


# Anything at all, what looks like a name, and a name with a character or two exchanged.
LETTERS = string.ascii_letters + string.digits
NAMES = st.builds(
    "{}/{}".format,
    st.text(LETTERS + "-_", min_size=1, max_size=41),
    st.text(LETTERS + "-_.", min_size=1, max_size=102),
)
ANYTHING = st.one_of(
    st.text(),
    NAMES,
    st.builds(
        lambda name, at, c: name[:at] + c + name[at + 1 :], NAMES, st.integers(0, 9), st.text()
    ),
    st.text("ab./%2eE-_\\:@?#\n\x00\u202e", max_size=12),
)


def test_whatever_the_name_it_is_refused_or_is_the_end_of_the_path(paths):
    accepted = []

    @settings(max_examples=1000, deadline=None, derandomize=True, database=None)
    @given(ANYTHING)
    def check(name):
        paths.clear()
        try:
            pipeline.check_arguments([name])
        except ValueError:
            return
        accepted.append(name)
        pipeline.fetch_stats.fn(name)
        ((_, _, host, path),) = paths
        assert host == httpx.URL(pipeline.api_url()).netloc
        assert path == f"/repos/{name}".encode()
        assert re.fullmatch(rb"/repos/[A-Za-z0-9_-]+/(?!\.\.?$)[A-Za-z0-9_.-]+", path)

    check()
    assert len(accepted) > 100


# --- Answers --------------------------------------------------------------------------------------


def test_an_answer_cannot_choose_what_is_made_of_it(github, capsys):
    answers = {
        # Owners name the custom properties of their repositories: these are Prefect's own marks.
        "load-test/0": {"custom_properties": {"__class__": "this.c", "data": 1}},
        "load-test/1": {"__class__": "this.c", "data": 1},
        "load-test/2": {"__exc_type__": "builtins.SystemExit", "message": "bye"},
        "load-test/3": {"description": "\ud800 \x00 \x1b[31m \u202e"},
    }
    assert "this" not in sys.modules
    for repo, fields in answers.items():
        github.fail(repo, fields=fields, times=None)
    stars = show_stars([*answers])
    assert show_stars([*answers]) == stars  # from the cache
    assert len(github.requests) == len(answers)
    assert "this" not in sys.modules
    assert "\x1b[31m" not in capsys.readouterr().out


# --- The token ------------------------------------------------------------------------------------

TOKEN = "ghp_q7TrAp0nceF0undDoNotPr1ntMeAnywh3re"  # of the form, but nobody's
MARK = "load-test/mark-for-the-search"


def traces(text):
    """A text as bytes, and as base64 has it at any offset."""
    encoded = [base64.b64encode(b"x" * n + text.encode()) for n in range(3)]
    return [text.encode(), *(code[4:-4] for code in encoded)]


def files_with(text):
    """The files in the home of Prefect that have the text in them; databases also as SQL."""
    found = set()
    for file in lesson.HOME.rglob("*"):
        if file.is_file() and any(trace in file.read_bytes() for trace in traces(text)):
            found.add(file.relative_to(lesson.HOME))
    with sqlite3.connect(f"file:{lesson.HOME / 'prefect.db'}?mode=ro", uri=True) as database:
        database.text_factory = bytes
        for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'"):
            for row in database.execute(f'SELECT * FROM "{table.decode()}"'):
                if any(trace in str(row).encode() for trace in traces(text)):
                    found.add(table.decode())
    database.close()
    return found


def wait_until_recorded(count):
    """Wait until Prefect's server has the last log of the last `count` flow runs."""
    deadline = time.monotonic() + 60
    with get_client(sync_client=True) as client:
        while time.monotonic() < deadline:
            runs = {run.id for run in client.read_flow_runs(sort="START_TIME_DESC", limit=count)}
            logs = client.read_logs(sort="TIMESTAMP_DESC", limit=200)
            last = {log.flow_run_id for log in logs if "Finished in state" in log.message}
            if runs <= last:
                return
            time.sleep(0.1)
    raise TimeoutError


@pytest.mark.slow
def test_the_token_is_told_to_nobody(github, monkeypatch, caplog, capfd):
    monkeypatch.setenv("GITHUB_TOKEN", TOKEN)
    github.rate_limit = 60
    monkeypatch.setattr(pipeline.client(), "timeout", httpx.Timeout(2))
    caplog.set_level(logging.DEBUG)
    faults = [
        {"status": 401},
        {"status": 503},
        {"kind": "secondary rate limit", "headers": {"retry-after": "1"}},
        {"kind": "reset"},
        {"kind": "truncated"},
        {"latency": 60},
        {"body": "<html>"},
        {"location": "http://127.0.0.1:9/"},
        {"location": "http://[/"},
    ]
    failing = [f"load-test/{n}" for n in range(len(faults))]
    with FakeGitHub(latency=0) as another_host:
        for repo, fault in zip(failing, faults, strict=True):
            times = 4 if "latency" not in fault else 1
            github.fail(repo, times=times, **fault)
        github.fail("load-test/moved", location=f"{another_host.url}/repos/load-test/moved")
        with pytest.raises(IncompleteError) as failed:
            show_stars([MARK, "load-test/moved", *failing])
        github.fail(failing[2], "rate limit")
        script = subprocess.run(
            [sys.executable, ROOT / "pipeline.py", MARK, *failing[:3], PYDANTIC],
            env=os.environ | {"PREFECT_LOGGING_LEVEL": "DEBUG"},
            cwd=lesson.HOME,
            capture_output=True,
            text=True,
            timeout=180,
        )
    assert github.requests["remaining"].max() > 60  # it was sent: it is good for 5,000 an hour
    assert set(failed.value.failures) == {r for r in failing if r != "load-test/5"}

    said = [script.stdout, script.stderr, caplog.text, *capfd.readouterr()]
    for error in (failed.value, *failed.value.failures.values()):
        said += [str(error), repr(error), *traceback.format_exception(error)]
        said += [pickle.dumps(error).decode("latin-1")]  # as Dask's workers send it
    assert any(MARK in text for text in said)
    assert not [text for text in said if any(t.decode() in text for t in traces(TOKEN))]

    wait_until_recorded(2)
    found = {str(place) for place in files_with(MARK)}
    assert {"log", "task_run", "prefect.db"} <= {place.split("-")[0] for place in found}
    assert any(place.startswith("storage") for place in found)
    assert files_with(TOKEN) == set()


def test_no_notebook_has_a_token():
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        text = notebook.read_text(encoding="utf-8")
        assert not re.search(
            r"\b(gh[opsur]_\w{10,}|github_pat_\w+)|Bearer (?!my-token|practice-key)\w", text
        )


# --- Who can listen -------------------------------------------------------------------------------


def listeners(process):
    family = [process, *process.children(recursive=True)]
    return [
        connection.laddr
        for one in family
        for connection in one.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]


def test_the_practice_api_and_the_prefect_server_listen_on_loopback_only(github):
    server = psutil.Process(json.loads(ADDRESS.read_text())["pid"])
    for process, url in ((psutil.Process(), github.url), (server, lesson.server_url())):
        addresses = listeners(process)
        assert httpx.URL(url).port in [address.port for address in addresses]
        assert {address.ip for address in addresses} == {"127.0.0.1"}
    others = [
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family == socket.AF_INET and not address.address.startswith("127.")
    ]
    for address in others:
        for url in (github.url, lesson.server_url()):
            with socket.socket() as client:
                client.settimeout(5)  # an interface that is down does not answer
                assert client.connect_ex((address, httpx.URL(url).port)) != 0

"""Runs of `python pipeline.py`: twice, killed, interrupted, without Prefect's server, many at once.

Shown is what the practice API was asked, what the cache has, and what a run said at its end.
"""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from test_lesson import until
from test_pipeline import PYDANTIC, STARS, host, lines

import lesson
import pipeline
from background import SERVER_LOG
from pipeline import show_stars

ROOT = Path(__file__).parents[1]
REPOS = [f"load-test/{n}" for n in range(40)]
SOME = REPOS[:24]

# --- Runs of the script ---------------------------------------------------------------------------

# To import Prefect takes seconds. A process that has done so forks for each run of the script.
READY = """\
import json, os, runpy, sys
import fastapi, prefect.flow_engine, prefect.task_engine, prefect.utilities.visualization
import pipeline
from prefect.context import refresh_global_settings_context
from prefect.logging.configuration import setup_logging

for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
    elif pid := os.fork():
        print(pid, flush=True)
    else:
        os.dup2(os.open(order["out"], os.O_CREAT | os.O_WRONLY), 1)
        os.dup2(os.open(order["err"], os.O_CREAT | os.O_WRONLY), 2)
        if order["environment"]:
            os.environ.update(order["environment"])
            refresh_global_settings_context()
        setup_logging(incremental=False)
        sys.argv[1:] = order["repos"]
        runpy.run_path(pipeline.__file__, run_name="__main__")
"""


class Ready:
    def __init__(self, folder):
        self.folder, self.runs = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, "-c", READY],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def tell(self, **order):
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def run(self, repos=REPOS, out="", **environment):
        """Begin a run of `python pipeline.py` with these repositories, which prints to a file."""
        return Run(self, repos, out, environment)

    def end_runs(self):
        for run in psutil.Process(self.process.pid).children():
            run.kill()
            self.tell(wait=run.pid)

    def end(self):
        self.process.kill()
        self.process.communicate()


class Run:
    """A run of the script. Its output goes to files, so that it never waits for a reader."""

    def __init__(self, ready, repos, out, environment):
        self.ready = ready
        ready.runs += 1
        self.out, self.err = (ready.folder / f"{name}-{ready.runs}" for name in ("out", "err"))
        self.err.touch()
        self.pid = ready.tell(
            out=out or str(self.out), err=str(self.err), repos=repos, environment=environment
        )

    def has_ended(self):
        return psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE

    def until(self, condition):
        until(lambda: condition() or self.has_ended())
        assert not self.has_ended(), self.err.read_text()

    def wait(self):
        """Wait for the end of the run. Returns the exit code."""
        until(self.has_ended)
        return self.ready.tell(wait=self.pid)

    def end(self, number):
        """End it with a signal. Returns the exit code."""
        os.kill(self.pid, number)
        return self.wait()


@pytest.fixture(scope="module")
def ready_process(practice_api, tmp_path_factory):
    if not hasattr(os, "fork"):
        pytest.skip("no fork, no SIGKILL, no Ctrl-C for another process")
    ready = Ready(tmp_path_factory.mktemp("runs"))
    yield ready
    ready.end()


@pytest.fixture
def ready(ready_process):
    yield ready_process
    ready_process.end_runs()


def files():
    return sorted(lesson.saved_files())


def cached():
    """The stars of the repositories in the cache, by name. What is not whole is not there."""
    stars = {}
    for file in files():
        with contextlib.suppress(ValueError, KeyError):  # KeyError: an exception, kept by Prefect
            result = json.loads(json.loads(file.read_text(encoding="utf-8"))["result"])
            stars[result["full_name"]] = result["stargazers_count"]
    return stars


def asked(github):
    """The repositories that were asked, in order."""
    return github.requests["repository"].tolist()


NO_LINGER = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)


class Line:
    """What leads to Prefect's server. Cut, it resets what is open and refuses the rest.

    The `bad`-th request that begins with `request` is answered 500.
    """

    def __init__(self):
        self.request, self.bad = None, 0
        self.server = ("127.0.0.1", int(lesson.server_url().rpartition(":")[2]))
        self.port = 0
        self.restore()
        self.url = f"http://127.0.0.1:{self.port}/api"

    def restore(self):
        self.listener, self.ends = socket.create_server(("127.0.0.1", self.port)), []
        self.port = self.listener.getsockname()[1]
        Thread(target=self.accept, args=[self.listener, self.ends], daemon=True).start()

    def accept(self, listener, ends):
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(self.server)
                ends += [client, server]
                for pair in ((client, server), (server, client)):
                    Thread(target=self.pass_on, args=pair, daemon=True).start()

    def pass_on(self, one, other):
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                if self.request and data.startswith(self.request):
                    self.bad -= 1
                    if self.bad == 0:
                        one.sendall(b"HTTP/1.1 500 Oh\r\ncontent-length: 0\r\n\r\n")
                        continue
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)

    def cut(self):
        for end in (self.listener, *self.ends):
            with contextlib.suppress(OSError):  # to linger for no time makes closing a reset
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@pytest.fixture
def line(practice_api):
    line = Line()
    yield line
    line.cut()


def check_next_run(github, repos=REPOS):
    """The next run has everything right, and asks only for what is not cached. Returns that."""
    missing = set(repos) - set(cached())
    github.reset()
    github.latency = 0
    stars = show_stars(repos)
    assert list(stars) == repos
    assert sorted(asked(github)) == sorted(missing)
    assert cached() == stars
    return missing


# --- From the first line to the last --------------------------------------------------------------


def in_new_process(*repos, **environment):
    """Runs the script to its end. Returns its exit code, what it printed, and what it said."""
    done = subprocess.run(
        [sys.executable, ROOT / "pipeline.py", *repos],
        env=os.environ | environment,
        cwd=lesson.HOME,
        capture_output=True,
        text=True,
        timeout=180,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def script(request):
    """As `in_new_process`, but quicker where a process can fork."""

    def run(*repos, **environment):
        run = request.getfixturevalue("ready").run(repos, **environment)
        return run.wait(), run.out.read_text(), run.err.read_text()

    return run if hasattr(os, "fork") else in_new_process


def test_twice(github, script):
    code, printed, said = script()
    assert (code, printed) == (0, lines(STARS))
    assert said.count("Finished in state Completed()") == 7
    code, printed, said = script()
    assert (code, printed) == (0, lines(STARS))
    assert said.count("Finished in state Cached(type=COMPLETED)") == 3
    assert len(github.requests) == 3


def test_a_failure_shows_the_rest_and_one_line(github, script):
    code, printed, said = script(PYDANTIC, "PrefectHQ/perfect")
    assert (code, printed) == (1, lines({PYDANTIC: STARS[PYDANTIC]}))
    # Without the line that Prefect adds if it has not yet sent all events.
    said = "".join(line for line in said.splitlines(True) if "EventsWorker" not in line)
    assert said.endswith(
        f"1 of 2 repositories failed ({github.url})\n"
        f"PrefectHQ/perfect: 404 from {host(github)}: Not Found\n"
    )
    assert "Traceback" not in said


def test_an_api_that_cannot_be_reached_is_named(github, script):
    code, _, said = script("no/answer", GITHUB_API_URL="http://127.0.0.1:9")
    assert code == 1
    first, second = said.splitlines()[-2:]
    assert first == "1 of 1 repositories failed (http://127.0.0.1:9)"
    assert re.fullmatch(r"no/answer: ConnectError\(.+refused.*\)", second)
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        (
            {"PREFECT_API_URL": "", "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false"},
            r"\(.*\) failed: \w+\(['\"]No Prefect API URL",
        ),
        (
            {"PREFECT_API_URL": "http://127.0.0.1:9/api"},
            r"\(http://127.0.0.1:9/api\) failed: \w+\(['\"]Failed to reach API",
        ),
        (
            {"PREFECT_API_URL": "http://127.0.0.1:42OO/api"},
            r"\(http://127.0.0.1:42OO/api\) failed: \w+\(['\"]Invalid port",
        ),
    ],
)
def test_no_prefect_server_is_an_error_that_says_so(practice_api, script, environment, why):
    code, printed, said = script(PYDANTIC, **environment)
    assert (code, printed) == (3, "")
    assert re.search(f"The Prefect server {why}", said)
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ALL_PROXY", "socks5://127.0.0.1:1"),
        ("SSL_CERT_FILE", "/no/such/file"),
        ("NO_PROXY", "localhost,[::1]"),
    ],
)
def test_what_httpx_cannot_use_of_the_environment_is_named(practice_api, script, variable, value):
    no_proxy = value if variable == "NO_PROXY" else ""  # the lessons have a star there
    environment = {"no_proxy": no_proxy, "NO_PROXY": no_proxy, variable: value}
    code, printed, said = script(PYDANTIC, **environment)
    assert (code, printed) == (2, "")
    assert re.search(rf"error: .*{variable}.*: .", said)
    assert "Traceback" not in said


def test_no_proxy_is_asked_for_what_is_on_this_machine(github, script):
    proxy = {"http_proxy": "http://127.0.0.1:9", "NO_PROXY": "no.one", "no_proxy": "example.org"}
    assert script(PYDANTIC, **proxy)[:2] == (0, lines({PYDANTIC: STARS[PYDANTIC]}))


def test_what_cannot_be_kept_is_said(github, script):
    code, printed, said = script(PYDANTIC, PREFECT_LOCAL_STORAGE_PATH="/dev/null/nothing")
    assert (code, printed) == (0, lines({PYDANTIC: STARS[PYDANTIC]}))
    assert (
        len(re.findall(r"error was encountered while committing .*NotADirectoryError", said)) == 1
    )
    assert "Traceback" not in said


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_stdout_that_nobody_reads_is_no_error(github, unbuffered):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, ROOT / "pipeline.py", PYDANTIC],
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        cwd=lesson.HOME,
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        timeout=180,
    )
    os.close(writing)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="no shell that can close it")
def test_stdout_has_only_stars_if_stderr_is_closed(github):
    command = [sys.executable, ROOT / "pipeline.py", PYDANTIC, "no/such"]
    shell = ["sh", "-c", 'exec "$@" 2>&-', "sh", *command]
    done = subprocess.run(shell, cwd=lesson.HOME, stdout=subprocess.PIPE, text=True, timeout=180)
    assert (done.returncode, done.stdout) == (1, lines({PYDANTIC: STARS[PYDANTIC]}))


GUESTS = {  # how it is run, what is typed then, and what that prints
    "a notebook": (
        ["-m", "IPython", "--colors=NoColor", "--simple-prompt"],
        "%run {script} {repo}\nprint(6 * 7)\n",
    ),
    "an interactive Python": (["-i", "{script}", "{repo}"], ""),
    "a debugger": (["-m", "pdb", "-c", "continue", "{script}", "{repo}"], ""),
}
STATE = """
import signal, sys, threading
print("handler", signal.getsignal(signal.SIGINT) is signal.default_int_handler)
print("timers", [t for t in threading.enumerate() if isinstance(t, threading.Timer)], 6 * 7)
"""


@pytest.mark.slow
@pytest.mark.parametrize("guest", GUESTS)
def test_as_a_guest_it_leaves_the_process_as_it_was(github, guest):
    options, typed = GUESTS[guest]
    words = {"script": ROOT / "pipeline.py", "repo": PYDANTIC}
    done = subprocess.run(
        [sys.executable, *(option.format(**words) for option in options)],
        input=typed.format(**words) + STATE + ("q\n" if guest == "a debugger" else ""),
        cwd=lesson.HOME,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert lines({PYDANTIC: STARS[PYDANTIC]}) in done.stdout, done.stderr
    assert "handler True" in done.stdout
    assert "timers [] 42" in done.stdout
    assert done.returncode == 0


def test_it_can_be_called_where_a_loop_runs(github, capsys):
    async def cell():
        return pipeline.main([PYDANTIC])

    assert asyncio.run(cell()) == 0
    assert lines({PYDANTIC: STARS[PYDANTIC]}) in capsys.readouterr().out


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT for another process")
def test_interrupted_while_it_imports(practice_api):
    run = subprocess.Popen([sys.executable, ROOT / "pipeline.py"], stderr=subprocess.PIPE)
    process = psutil.Process(run.pid)
    until(lambda: any("pydantic" in file.path for file in process.memory_maps()))
    run.send_signal(signal.SIGINT)
    assert run.communicate(timeout=60) == (None, b"")
    assert run.returncode == -signal.SIGINT


def test_a_temporary_server_that_cannot_start_is_an_error_at_once(practice_api, tmp_path):
    home = tmp_path / "home"
    home.write_text("a file, and no folder")
    environment = {"PREFECT_HOME": str(home), "PREFECT_API_URL": ""}
    code, printed, said = in_new_process(PYDANTIC, **environment)
    assert (code, printed) == (3, "")
    assert re.search(r"\nThe Prefect server \(temporary\) failed: .*unable to open database", said)
    assert "Traceback" not in said


def test_bad_names_and_addresses_are_refused(monkeypatch, capsys):
    def message(*arguments):
        with pytest.raises(SystemExit) as end:
            pipeline.main(list(arguments))
        assert end.value.code == 2
        said = capsys.readouterr()
        assert said.out == ""
        return said.err.splitlines()[-1].partition(" error: ")[2]

    refused = "not a list of repositories, as owner/name: ['../user', 'a b']"
    assert message("../user", PYDANTIC, "a b") == refused
    monkeypatch.setenv("GITHUB_API_URL", "nonsense")
    assert message().startswith("GITHUB_API_URL is not an http(s) address: 'nonsense'")


def test_a_mistake_in_the_file_is_not_told_as_the_servers(github, monkeypatch):
    monkeypatch.setattr(pipeline, "named_get_stars", lambda stats: stats["no such key"])
    with pytest.raises(KeyError, match="no such key"):
        pipeline.main([PYDANTIC])


@pytest.fixture
def no_server(new_database, tmp_path, monkeypatch):
    """The environment of somebody who has no Prefect server, and a database."""
    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        monkeypatch.delenv(name)  # the lessons' server is calm already
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(new_database, home / "prefect.db")  # to make one takes ten seconds
    return {"HOME": str(tmp_path), "USERPROFILE": str(tmp_path), "PREFECT_HOME": str(home)}


def test_on_a_temporary_server(github, no_server):
    code, printed, said = in_new_process(PYDANTIC, **no_server)
    assert (code, printed) == (0, lines({PYDANTIC: STARS[PYDANTIC]}))
    assert "Starting a temporary Prefect server" in said
    assert "Traceback" not in said
    code, printed, said = in_new_process(*SOME, **no_server)
    assert code == 0
    assert [line.partition(":")[0] for line in printed.splitlines()] == SOME
    assert "Error flushing 1 events" not in said  # its writes do not get in each other's way


@pytest.mark.slow
def test_on_a_temporary_server_where_a_loop_runs(github, no_server):
    cell = "import asyncio, pipeline\nasync def cell(): return pipeline.main(['a/b'])\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{cell}print('exit code', asyncio.run(cell()))"],
        env=os.environ | no_server | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert "1 of 1 repositories failed" in done.stderr
    assert done.stdout.splitlines()[-1] == "exit code 1"


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no SIGINT for another process")
def test_impatience_leaves_no_traceback_and_no_server(github, no_server):
    github.latency = 0.3
    run = subprocess.Popen(
        [sys.executable, ROOT / "pipeline.py", *REPOS],
        env=os.environ | no_server,
        stderr=subprocess.PIPE,
        text=True,
    )
    process = psutil.Process(run.pid)
    with contextlib.suppress(AssertionError):  # on a busy machine it takes more than a minute
        until(lambda: len(asked(github)) > 5)
    until(lambda: len(asked(github)) > 5)
    servers = process.children(recursive=True)
    for _ in range(2):  # within a second
        run.send_signal(signal.SIGINT)
        time.sleep(0.5)
    said = run.communicate(timeout=60)[1]
    assert run.returncode == 130
    assert said.count("Interrupted. What was fetched is cached.\n") == 1
    assert "Traceback" not in said
    assert "Logging error" not in said
    assert servers
    assert psutil.wait_procs(servers, timeout=30)[1] == []


# --- SIGKILL and Ctrl-C ---------------------------------------------------------------------------


def test_after_each_sigkill_a_run_asks_only_for_what_is_not_cached(github, ready):
    for moment in (1, 10, 20):
        before = cached()
        github.reset()
        github.latency = 0.05
        run = ready.run()
        run.until(lambda moment=moment: len(files()) >= moment)
        assert run.end(signal.SIGKILL) == -signal.SIGKILL
        assert not set(before) & set(asked(github))
        assert len(before) <= len(cached()) < len(REPOS)
    assert check_next_run(github)


def test_half_a_result_counts_as_missing(github):
    repos = REPOS[:30]
    show_stars(repos)
    for n, file in enumerate(files()[:-5]):  # 25 lengths, from none to all but one byte
        whole = file.read_bytes()
        file.write_bytes(whole[: (len(whole) - 1) * n // 24])
    files()[-5].write_bytes(bytes(5000))  # as a power failure may leave it
    assert len(check_next_run(github, repos)) == 26


def check_interrupted(run):
    said = run.err.read_text()
    assert said.count("Interrupted. What was fetched is cached.\n") == 1
    assert "Traceback" not in said
    for file in files():
        json.loads(file.read_text(encoding="utf-8"))


def test_interrupted_it_keeps_what_it_has(github, ready):
    github.fail(PYDANTIC, latency=100)
    run = ready.run([])
    run.until(lambda: len(files()) == 2)
    assert run.end(signal.SIGINT) == 130
    check_interrupted(run)
    assert check_next_run(github, pipeline.REPOS) == {PYDANTIC}


def test_ctrl_c_while_a_worker_waits_for_github(github, ready):
    github.fail(REPOS[0], status=429, headers={"retry-after": 110})
    run = ready.run(SOME)
    run.until(lambda: "it asks to wait 110 s" in run.err.read_text())
    assert run.end(signal.SIGINT) == 130
    check_interrupted(run)
    assert REPOS[0] in check_next_run(github, SOME)


WAITS = re.compile(r"\d+ wait for slots of github-api, one each 1e\+03 s")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_workers_wait_for_a_slot(github, ready, number):
    lesson.new_limit("github-api", 5, 1e-3)
    run = ready.run(SOME)
    run.until(lambda: len(cached()) == 5 and WAITS.search(run.err.read_text()))
    time.sleep(4)  # seconds, in which there is another look at the limit
    assert len(WAITS.findall(run.err.read_text())) == 1  # a line a minute
    assert run.end(number) == 128 + number
    check_interrupted(run)
    lesson.new_limit("github-api", 5000, 5000 / 3600)
    assert len(check_next_run(github, SOME)) == len(SOME) - 5


# --- Prefect's server -----------------------------------------------------------------------------


no_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no disk that is full")


@pytest.mark.parametrize(
    ("slots", "out"),
    [(200, ""), (20, ""), pytest.param(200, "/dev/full", marks=no_full)],  # enough; too few
)
def test_a_prefect_server_gone_for_good_is_an_error_and_no_hang(github, ready, line, slots, out):
    github.latency = 0.05
    lesson.new_limit("github-api", slots, 1e-9)
    run = ready.run(out=out, PREFECT_API_URL=line.url, PREFECT_CLIENT_MAX_RETRIES="0")
    run.until(lambda: len(cached()) >= 10)
    line.cut()
    assert run.wait() == 3
    said = run.err.read_text()
    assert said.count(f"The Prefect server ({line.url}) failed: ") == 1
    assert "Traceback" not in said
    if out:
        return
    printed = [line.partition(":")[0] for line in run.out.read_text().splitlines()]
    assert 10 <= len(printed) < len(REPOS)
    assert sorted(printed) == sorted(cached())


def test_a_prefect_server_away_for_a_while_loses_nothing(github, ready, line):
    github.latency = 0.05
    lesson.new_limit("github-api", 200, 1e-9)  # so few that they are acquired 16 at a time
    run = ready.run(SOME, PREFECT_API_URL=line.url, PREFECT_LOGGING_LEVEL="DEBUG")
    run.until(lambda: len(cached()) >= 10)
    line.cut()
    run.until(lambda: "Another attempt will be made in" in run.err.read_text())
    line.restore()
    assert run.wait() == 0
    assert len(run.out.read_text().splitlines()) == len(cached()) == len(SOME)
    assert sorted(asked(github)) == sorted(SOME)
    name = re.search("Flow run '(.+?)' - Finished in state Completed", run.err.read_text())[1]
    with get_client(sync_client=True) as client:
        by_name = FlowRunFilter(name={"any_": [name]})
        (flow_run,) = client.read_flow_runs(flow_run_filter=by_name)
    assert flow_run.state.is_completed()
    assert set(lesson.task_states(flow_run.state, count=2 * len(SOME)).values()) == {"Completed"}


@pytest.mark.parametrize(
    ("request_", "number"),
    [
        (b"GET /api/v2/concurrency_limits/github-api", 1),  # of the flow
        (b"GET /api/v2/concurrency_limits/github-api", 2),  # of a worker
        (b"POST /api/v2/concurrency_limits/increment", 1),
    ],
)
def test_a_prefect_server_that_errs_once_costs_nothing(github, ready, line, request_, number):
    line.request, line.bad = request_, number
    repos = REPOS[:8]
    run = ready.run(repos, PREFECT_API_URL=line.url)
    assert run.wait() == 0, run.err.read_text()
    assert line.bad <= 0
    assert sorted(asked(github)) == sorted(repos)


# --- Many processes -------------------------------------------------------------------------------


def test_four_processes_share_the_limit(github, ready):
    limit, decay = 8, 4
    lesson.new_limit("github-api", limit, decay)
    repos = REPOS[:16]
    runs = [ready.run(repos[n::4]) for n in range(4)]
    assert [run.wait() for run in runs] == [0] * 4
    assert sorted(asked(github)) == sorted(repos)
    times = github.requests["time"].tolist()
    for first, begin in enumerate(times):
        for last, end in enumerate(times[first:], first):
            assert last - first + 1 <= limit + decay * (end - begin)


def test_four_processes_run_the_same_at_once(github, ready):
    repos = REPOS[:12]
    github.latency = 5  # until each of them has asked
    runs = [ready.run(repos) for _ in range(4)]
    until(lambda: asked(github).count(repos[0]) == 4)
    github.latency = 0
    log = {"encoding": "utf-8", "errors": "replace"}
    for run in runs:
        assert run.wait() == 0, run.err.read_text()
    stars = cached()  # nobody is writing any more
    for run in runs:
        assert run.out.read_text().splitlines() == [
            f"{repo}: {stars[repo]} stars" for repo in repos
        ]
        assert "Traceback" not in run.err.read_text()
        assert "database is locked" not in run.err.read_text() + SERVER_LOG.read_text(**log)
    assert len(files()) == len(stars) == len(repos)

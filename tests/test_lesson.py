"""The set-up cell through a kernel's life, and whatever may be in its way.

What `lesson.py` does with its background server is tried with a stand-in, which is up at once.
"""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import httpx
import psutil
import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.exceptions import ObjectNotFound

import lesson
import server

ROOT = Path(__file__).parents[1]
TOKEN = "ghp_Th1sIsN0tF0rPract1ceAndN0bodys"

# --- The background server ------------------------------------------------------------------------

# In the place of `python -m prefect server start --host 127.0.0.1 --port N`. With a file "mute" in
# its home it never answers, with a file "broken" it says what is in there and ends.
STAND_IN = """\
import importlib.metadata, json, os, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        answers = {"settings": {"home": os.environ["PREFECT_HOME"]}, "version": version}
        self.wfile.write(json.dumps(answers[self.path.split("/")[-1]]).encode())

version = importlib.metadata.version("prefect")
if os.path.exists("old"):
    version = Path("old").rename("history").read_text()
if os.path.exists("broken"):
    sys.exit(Path("broken").read_text())
while os.path.exists("mute"):
    time.sleep(0.1)
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def stand_in(folder):
    """A new folder for PYTHONPATH, with a stand-in for Prefect that is up at once."""
    package = folder / "stand in" / "prefect"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(STAND_IN, encoding="utf-8")
    return str(package.parent)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A fresh home for `lesson`, whose servers are stand-ins. Ends all that were started in it."""
    home = tmp_path / ".lessons"
    monkeypatch.setattr(server, "HOME", home)
    monkeypatch.setattr(lesson, "HOME", home)
    monkeypatch.setattr(server, "ADDRESS", home / "server.json")
    monkeypatch.setattr(server, "SERVER_LOG", home / "server.log")
    monkeypatch.setattr(server, "PORTS", (0,))
    monkeypatch.setattr(server, "START_UP", 30)
    monkeypatch.setitem(server.SETTINGS, "PREFECT_HOME", str(home))
    monkeypatch.setenv("PYTHONPATH", stand_in(tmp_path))
    yield home
    end_servers_in(home)


def servers_in(home):
    """The processes that are running in a home, without their children."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cwd() == str(home) and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = process
    return [process for process in found.values() if process.ppid() not in found]


def end_servers_in(home):
    def none_left():
        servers = servers_in(home)
        for server in servers:
            with contextlib.suppress(psutil.NoSuchProcess):
                server.kill()
        return not servers

    until(none_left)


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def pid():
    return json.loads(server.ADDRESS.read_text())["pid"]


def test_the_server_is_started_once(home, capsys):
    url = server.start_server()
    assert server.start_server() == server.server_url() == url
    assert [server.pid for server in servers_in(home)] == [pid()]
    assert capsys.readouterr().out.count("Starting the Prefect server") == 1


def test_several_kernels_at_once_start_one_server(home):
    stand_in = os.environ.pop("PYTHONPATH")  # for the server alone
    code = (
        f"import os, lesson, server; server.PORTS = (0,); os.environ['PYTHONPATH'] = {stand_in!r}"
    )
    kernels = [
        subprocess.Popen(
            [sys.executable, "-c", f"{code}; print(server.start_server())"],
            cwd=ROOT / "notebooks",
            env=os.environ | {"LESSONS_HOME": str(home.parent)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    printed = [kernel.communicate(timeout=60)[0].splitlines() for kernel in kernels]
    assert {lines[-1] for lines in printed} == {server.server_url()}
    assert sorted(map(len, printed)) == [1, 1, 1, 2]  # one of them says that it starts it
    assert len(servers_in(home)) == 1


def test_a_server_that_died_is_replaced(home):
    server.start_server()
    (died,) = servers_in(home)
    end_servers_in(home)
    assert server.server_url() is None
    assert server.start_server() == server.server_url()
    assert [server.pid for server in servers_in(home)] == [pid()] != [died.pid]


@pytest.mark.parametrize("young", [False, True])
def test_a_start_that_was_interrupted_leaves_no_second_server(home, monkeypatch, young):
    home.mkdir()
    (home / "mute").touch()
    if young:  # the system has not given it its command line yet
        monkeypatch.setattr(psutil.Process, "cmdline", lambda self: [])
    with monkeypatch.context() as patch:
        patch.setattr(server.time, "sleep", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            server.start_server()
    assert len(servers_in(home)) == 1
    (home / "mute").unlink()
    assert server.start_server() == server.server_url()
    assert len(servers_in(home)) == 1


def test_a_server_of_another_version_is_replaced(home):
    home.mkdir()
    (home / "old").write_text("3.8.8")
    old = server._launch()
    assert server.server_url() == old
    (before,) = servers_in(home)
    assert server.start_server() == server.server_url()
    assert [server.pid for server in servers_in(home)] == [pid()] != [before.pid]
    assert (home / "history").exists()


@pytest.mark.parametrize(
    ("log", "sentence"),
    [
        ("", r"The Prefect server did not start \(it said nothing\)\. Its log is \S+\.log\."),
        ("First.\nLast.\n", r"The Prefect server did not start \(Last\.\)\. Its log is .*"),
        ("  File x\na.b.SomeError: why\n\nStopped!", r"The .* start \(a\.b\.SomeError: why\)\. .*"),
        (
            "alembic.CommandError: Can't locate revision identified by '0'\nServer stopped!",
            r"A newer Prefect than yours \([\d.]+\) wrote .* `python \S+lesson\.py reset`\.",
        ),
    ],
)
def test_a_server_that_does_not_come_up_is_one_sentence(home, log, sentence):
    home.mkdir()
    (home / "broken").write_text(log)
    with pytest.raises(server.SetupError) as failed:
        server.start_server()
    assert re.fullmatch(sentence, str(failed.value))
    assert (home / "server.log").read_text().strip() == log.strip()


@pytest.fixture
def foreign(tmp_path):
    """A process that is not ours, with a server that is none of Prefect's. Nobody may end it."""
    process = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)", "prefect"], cwd=tmp_path
    )

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"[]")

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield process.pid, server.server_port
    server.shutdown()
    server.server_close()
    assert process.poll() is None
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    "stale",
    [
        "",
        "{",
        "\udcff",
        "null",
        "[]",
        "7",
        "{}",
        '{"url": "http://127.0.0.1:9", "pid": FOREIGN}',
        '{"url": "http://127.0.0.1:PORT", "pid": FOREIGN}',
        '{"url": "http://[", "pid": "x"}',
        '{"url": 7, "pid": -1}',
        '{"url": null, "pid": null}',
        '{"url": "http://127.0.0.1:9", "pid": 4194305}',
    ],
)
def test_a_stale_address_heals_and_ends_no_foreign_process(home, foreign, stale):
    text = stale.replace("FOREIGN", str(foreign[0])).replace("PORT", str(foreign[1]))
    home.mkdir()
    server.ADDRESS.write_text(text, encoding="utf-8", errors="surrogateescape")
    assert server.stop_server() is False
    server.ADDRESS.write_text(text, encoding="utf-8", errors="surrogateescape")
    assert server.server_url() is None
    assert server.start_server() == server.server_url()
    assert len(servers_in(home)) == 1


def test_the_port_of_another_is_left_alone(home, foreign, monkeypatch):
    monkeypatch.setattr(server, "PORTS", (foreign[1], 0))
    url = server.start_server()
    assert httpx.URL(url).port != foreign[1]
    assert httpx.get(f"http://127.0.0.1:{foreign[1]}").json() == []


def test_reset_removes_what_the_lessons_made_and_nothing_else(home):
    (home / "storage").mkdir(parents=True)
    (home.parent / "storage").touch()
    for command, code in ("rest", 2), ("reset", 0):
        assert home.exists()
        done = subprocess.run(
            [sys.executable, lesson.__file__, command],
            env=os.environ | {"LESSONS_HOME": str(home.parent)},
            capture_output=True,
        )
        assert done.returncode == code
    assert not home.exists()
    assert (home.parent / "storage").exists()


def test_what_cannot_be_removed_is_one_line(tmp_path):
    (tmp_path / ".lessons").touch()  # no folder
    done = subprocess.run(
        [sys.executable, lesson.__file__, "reset"],
        env=os.environ | {"LESSONS_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert re.fullmatch(r"Cannot remove .+ \(.+\)\.\n", done.stderr)


@pytest.mark.parametrize("named", ["", "there", "../there", "~"])
def test_the_home_is_one_place_whatever_the_folder(tmp_path, named):
    places = set()
    for folder in ROOT, tmp_path:
        done = subprocess.run(
            [sys.executable, "-c", "import lesson; print(lesson.HOME)"],
            cwd=folder,
            env=os.environ | {"LESSONS_HOME": named, "PYTHONPATH": str(ROOT / "notebooks")},
            capture_output=True,
            text=True,
        )
        places.add(done.stdout.strip())
    folder = Path.home() if named == "~" else ROOT / "notebooks" / named
    assert places == {str((folder / ".lessons").resolve())}


def unwritable(tmp_path):
    """Folders that cannot be written, also not by root."""
    (tmp_path / "file").touch()
    yield tmp_path / "file"
    yield tmp_path / "file" / "home"
    if sys.platform == "linux":
        yield Path("/proc/lessons")
    if os.name == "posix" and os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        yield tmp_path / "locked"


def test_a_home_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    for home in unwritable(tmp_path):
        monkeypatch.setattr(server, "HOME", home)
        monkeypatch.setattr(server, "ADDRESS", home / "server.json")
        with pytest.raises(server.SetupError) as failed:
            server.start_server()
        assert re.fullmatch(
            rf"Cannot write to {re.escape(str(home))} \(.+\)\. "
            r"Set LESSONS_HOME to a folder that can be written\.",
            str(failed.value),
        )


# --- The set-up cell ------------------------------------------------------------------------------


@pytest.fixture
def no_practice_api_yet(github, monkeypatch):
    """As in a kernel that has not run the set-up cell; the practice API of the tests stays."""
    for name in ("GITHUB_API_URL", "PREFECT_API_URL"):
        monkeypatch.setenv(name, os.environ[name])
    monkeypatch.setattr(lesson, "_github", None)
    yield
    if lesson._github is not None:
        lesson._github.stop()


def test_the_practice_api_takes_the_next_port_if_one_is_taken(no_practice_api_yet, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(lesson, "PRACTICE_PORTS", (taken.getsockname()[1], 0))
        github = lesson.start()
    assert httpx.get(github.url, headers={"user-agent": "test"}).is_success


def test_the_limit_may_be_created_by_another_kernel_meanwhile(github, monkeypatch):
    def not_yet(*_):
        raise ObjectNotFound(Exception())

    monkeypatch.setattr(SyncPrefectClient, "read_global_concurrency_limit_by_name", not_yet)
    assert lesson.start() is github


@pytest.mark.parametrize(
    ("name", "text", "used"),
    [
        ("prefect.toml", "[tasks]\ndefault_retries = 2\n", True),
        ("pyproject.toml", "[tool.prefect.tasks]\ndefault_retries = 2\n", True),
        ("pyproject.toml", '[project]\ndependencies = ["prefect"]\n', False),
        (".env", "prefect_tasks_default_retries=2\n", True),
    ],
)
def test_a_kernel_leaves_a_folder_with_settings(home, tmp_path, monkeypatch, name, text, used):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(lesson, "FOLDER", tmp_path)
        patch.setattr(sys, "path", [*sys.path])
        patch.setenv("MATPLOTLIBRC", "")
        patch.chdir(tmp_path)
        lesson.leave_settings_files()
        assert Path.cwd() == (home if used else tmp_path)


# Each of these has reached a lesson once, or broken it.
READERS_OWN = {
    "prefect_tasks_default_retries": "2",
    "http_proxy": "socks7://127.0.0.1:1",
    "SSL_CERT_FILE": "nowhere",
    "PYTHONWARNINGS": "default",
    "MPLCONFIGDIR": lesson.__file__,
    "NO_PROXY": "api.github.com",
}
LOOK = """\
from prefect.settings import get_current_settings
print(get_current_settings().tasks.default_retries, flush=True)
"""
A_KERNEL = f"""\
import os, subprocess, sys
import lesson
from pathlib import Path
lesson.FOLDER = Path.cwd()
lesson.start()
import charts
{LOOK}
subprocess.run([sys.executable, "-c", {LOOK!r}])
try:
    lesson.go_live()
except lesson.SetupError as error:
    print(error)
print(os.environ["no_proxy"])
"""


@pytest.mark.slow
def test_nothing_of_the_readers_own_reaches_a_lesson(practice_api, tmp_path):
    (tmp_path / "prefect.toml").write_text("[tasks]\ndefault_retries = 2\n", encoding="utf-8")
    environment = {n: v for n, v in os.environ.items() if n.lower() != "no_proxy"}
    done = subprocess.run(
        [sys.executable, "-c", A_KERNEL],
        cwd=tmp_path,
        env=environment | READERS_OWN | {"PYTHONPATH": str(ROOT / "notebooks")},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.stderr == ""
    kernel, child, live, no_proxy = done.stdout.splitlines()[-4:]
    assert (kernel, child) == ("0", "0")
    assert live.startswith("A proxy that your environment names cannot be used: Unknown scheme")
    assert no_proxy == "api.github.com,127.0.0.1,localhost"


def test_going_live_can_be_run_again(github, monkeypatch):
    monkeypatch.setenv("GITHUB_API_URL", github.url)
    lesson.go_live()
    lesson.go_live()
    assert "GITHUB_API_URL" not in os.environ

"""The set-up cell through a kernel's life, and whatever may be in its way.

What `lesson.py` does with its background server is tried with a stand-in, which is up at once.
"""

import contextlib
import json
import os
import re
import shutil
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
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import ObjectNotFound

import background
import lesson
from pipeline import ensure_limit, fetch_stats, get_stars, show_stars

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
    monkeypatch.setattr(background, "HOME", home)
    monkeypatch.setattr(lesson, "HOME", home)
    monkeypatch.setattr(background, "ADDRESS", home / "server.json")
    monkeypatch.setattr(background, "SERVER_LOG", home / "server.log")
    monkeypatch.setattr(background, "PORTS", (0,))
    monkeypatch.setattr(background, "START_UP", 30)
    monkeypatch.setitem(background.SETTINGS, "PREFECT_HOME", str(home))
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
    return json.loads(background.ADDRESS.read_text())["pid"]


def test_the_server_is_started_once(home, capsys):
    url = background.start_server()
    assert background.start_server() == background.server_url() == url
    assert [server.pid for server in servers_in(home)] == [pid()]
    assert capsys.readouterr().out.count("Starting the Prefect server") == 1


def test_several_kernels_at_once_start_one_server(home):
    stand_in = os.environ.pop("PYTHONPATH")  # for the server alone
    code = (
        "import os, background\nbackground.PORTS = (0,)\n"
        f"os.environ['PYTHONPATH'] = {stand_in!r}\nprint(background.start_server())"
    )
    kernels = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT / "notebooks",
            env=os.environ | {"LESSONS_HOME": str(home.parent)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    printed = [kernel.communicate(timeout=60)[0].splitlines() for kernel in kernels]
    assert {lines[-1] for lines in printed} == {background.server_url()}
    assert sorted(map(len, printed)) == [1, 1, 1, 2]  # one of them says that it starts it
    assert len(servers_in(home)) == 1


def test_a_server_that_died_is_replaced(home):
    background.start_server()
    (died,) = servers_in(home)
    end_servers_in(home)
    assert background.server_url() is None
    assert background.start_server() == background.server_url()
    assert [server.pid for server in servers_in(home)] == [pid()] != [died.pid]


@pytest.mark.parametrize("young", [False, True])
def test_a_start_that_was_interrupted_leaves_no_second_server(home, monkeypatch, young):
    home.mkdir()
    (home / "mute").touch()
    if young:  # the system has not given it its command line yet
        monkeypatch.setattr(psutil.Process, "cmdline", lambda self: [])
    with monkeypatch.context() as patch:
        patch.setattr(background.time, "sleep", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            background.start_server()
    assert len(servers_in(home)) == 1
    (home / "mute").unlink()
    assert background.start_server() == background.server_url()
    assert len(servers_in(home)) == 1


def test_a_server_of_another_version_is_replaced(home):
    home.mkdir()
    (home / "old").write_text("3.8.8")
    old = background._launch()
    assert background.server_url() == old
    (before,) = servers_in(home)
    assert background.start_server() == background.server_url()
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
    with pytest.raises(background.SetupError) as failed:
        background.start_server()
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
    background.ADDRESS.write_text(text, encoding="utf-8", errors="surrogateescape")
    assert background.stop_server() is False
    background.ADDRESS.write_text(text, encoding="utf-8", errors="surrogateescape")
    assert background.server_url() is None
    assert background.start_server() == background.server_url()
    assert len(servers_in(home)) == 1


def test_the_port_of_another_is_left_alone(home, foreign, monkeypatch):
    monkeypatch.setattr(background, "PORTS", (foreign[1], 0))
    url = background.start_server()
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


def test_the_server_of_another_user_is_left_alone(home, monkeypatch):
    def denied(self):
        raise psutil.AccessDenied

    url = background.start_server()
    with monkeypatch.context() as patch:
        patch.setattr(psutil.Process, "cwd", denied)
        patch.setattr(sys, "argv", ["lesson.py", "reset"])
        with pytest.raises(SystemExit) as ended:
            lesson.main()
    assert str(ended.value).startswith(f"The Prefect server on {url} is another user's.")
    assert background.server_url() == url


def test_no_file_of_the_readers_shadows_a_module_of_the_server(home, monkeypatch):
    home.mkdir()
    (home / "calendar.py").write_text("raise SystemExit('a calendar of my own')")
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)  # for `pipeline`
    assert background.start_server() == background.server_url()
    (server,) = servers_in(home)
    assert str(ROOT) not in server.environ()["PYTHONPATH"].split(os.pathsep)


def test_a_python_that_is_gone_is_one_sentence(home, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(home / "python"))
    with pytest.raises(background.SetupError, match=r"^This kernel's .* \(.*No such file"):
        background.start_server()


def test_the_lock_leaves_other_errors_alone(tmp_path):
    with pytest.raises(FileNotFoundError), background.only_one(tmp_path):
        raise FileNotFoundError


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
        monkeypatch.setattr(background, "HOME", home)
        monkeypatch.setattr(background, "ADDRESS", home / "server.json")
        with pytest.raises(background.SetupError) as failed:
            background.start_server()
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


def test_another_kernel_may_replace_the_limit_meanwhile(github, monkeypatch):
    def no_more(*_):
        raise ObjectNotFound(Exception())

    monkeypatch.setattr(SyncPrefectClient, "read_global_concurrency_limit_by_name", no_more)
    assert lesson.start() is github


def test_a_set_up_cell_may_create_a_limit_that_is_being_replaced(github, monkeypatch):
    delete, created = lesson.delete_limit, []

    def delete_slowly(name):
        delete(name)
        if not created:
            created.append(lesson.keep_limit())

    monkeypatch.setattr(lesson, "delete_limit", delete_slowly)
    lesson.new_limit("github-api", 5, 0.5)
    with get_client(sync_client=True) as client:
        assert client.read_global_concurrency_limit_by_name("github-api").limit == 5


def test_the_dashboard_finds_its_server_from_any_address(github):
    host = {"Host": "x-4269.app.github.dev"}
    settings = httpx.get(f"{background.server_url()}/ui-settings", headers=host).json()
    assert settings["api_url"] == "/api"


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


ENTERPRISE = "https://ghe.example/api/v3"


@pytest.mark.parametrize(
    ("address", "token", "said"),
    [
        (None, None, "https://api.github.com without a token"),
        (None, TOKEN, "https://api.github.com with a token"),
        ("https://api.github.com", TOKEN, "https://api.github.com with a token"),  # as in Actions
        (ENTERPRISE, TOKEN, f"{ENTERPRISE} with a token"),
        (ENTERPRISE, None, f"{ENTERPRISE} without a token"),
        ("https://me:secret@ghe.example", TOKEN, "ghe.example with a token"),
    ],
)
def test_an_address_and_its_token_stay_together(github, monkeypatch, capsys, address, token, said):
    monkeypatch.setenv("GITHUB_API_URL", github.url)
    monkeypatch.delenv("GITHUB_TOKEN", raising=False)
    monkeypatch.setattr(lesson, "_api_url", address)
    monkeypatch.setattr(lesson, "_token", token)
    for _ in range(2):  # it can be run again
        lesson.go_live()
        assert capsys.readouterr().out == f"From here on: {said}\n"
    assert (os.environ.get("GITHUB_API_URL"), os.environ.get("GITHUB_TOKEN")) == (address, token)

    ensure_limit()
    assert lesson.start() is github
    assert os.environ["GITHUB_API_URL"] == github.url
    assert "GITHUB_TOKEN" not in os.environ
    assert "Limit" not in capsys.readouterr().out


def in_another_notebook(code, **environment):
    """What code prints after the set-up cell of another notebook."""
    done = subprocess.run(
        [sys.executable, "-c", f"import lesson\nlesson.start()\n{code}"],
        env=os.environ | {"PYTHONPATH": str(ROOT / "notebooks")} | environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.stderr == ""
    return done.stdout


def test_another_notebook_leaves_limit_and_results_alone(github):
    show_stars(["dask/dask"])
    lesson.new_limit("github-api", 5, 0.5)
    code = "print(len(lesson.saved_files()))\nlesson.clear_cache()"
    printed = in_another_notebook(code, JPY_SESSION_NAME="/there/05_caching.ipynb")
    assert printed.splitlines()[2:] == [
        "Limit github-api   5 slots, 0.5 a second. Not in use? lesson.usual_limit() restores it.",
        "0",
    ]
    with get_client(sync_client=True) as client:
        limit = client.read_global_concurrency_limit_by_name("github-api")
    assert (limit.limit, limit.slot_decay_per_second) == (5, 0.5)
    assert len(lesson.saved_files()) == 1


PATH = "/there/05_caching.ipynb"


@pytest.mark.parametrize(
    ("assigned", "environment", "files"),
    [
        ("", {"JPY_SESSION_NAME": PATH}, ["one.json", "two.json"]),  # JupyterLab
        (f"__vsc_ipynb_file__ = {PATH!r}; ", {}, ["one.json", "two.json"]),  # VS Code
        ("", {}, ["one.json", "one.json"]),  # neither: a kernel that is restarted keeps its file
    ],
)
def test_a_kernel_finds_the_results_of_the_one_before(assigned, environment, files):
    storages = {
        subprocess.run(
            [sys.executable, "-c", f"{assigned}import lesson; print(lesson.STORAGE)", "-f", file],
            cwd=ROOT / "notebooks",
            env=os.environ | environment,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for file in files
    }
    assert storages != {str(lesson.STORAGE)}
    assert [Path(storage).parent for storage in storages] == [lesson.HOME / "storage"]


def test_a_notebook_has_its_own_results():
    paths = "/a/05_caching.ipynb", "/b/05_caching.ipynb", "/a/" + 300 * "x", "C:\\a:b", "\udcff"
    folders = [lesson.results_of(path) for path in paths]
    assert len(set(folders)) == len(paths)
    assert folders == [lesson.results_of(path) for path in paths]
    for folder in folders:
        assert folder.parent == lesson.HOME / "storage"
        assert re.fullmatch(r"[\w-]{1,60}", folder.name.encode("ascii", "replace").decode())


def test_a_folder_that_only_others_can_write_is_one_sentence(github, tmp_path, monkeypatch):
    """As in a course folder: the server is up, the results cannot be kept."""
    there = [Path("/proc")] if sys.platform == "linux" else []
    for storage in *unwritable(tmp_path), *there:
        monkeypatch.setattr(lesson, "STORAGE", storage)
        with pytest.raises(lesson.SetupError, match=r"^Cannot write to .* Set LESSONS_HOME"):
            lesson.start()


# --- Other processes ------------------------------------------------------------------------------

WHERE = """
import subprocess, sys
import lesson
import calendar, httpx, pipeline, prefect, random
print(calendar.__file__, httpx.__file__, prefect.__file__, random.__file__)
print(pipeline.__file__, flush=True)
for before in [], ["-P"]:
    subprocess.run([sys.executable, *before, "-c", "import pipeline; print(pipeline.__file__)"])
from distributed import Client
with lesson.dask_cluster(1, 1) as cluster, Client(cluster) as client:
    print(client.submit(lambda: __import__("pipeline").__file__).result())
"""


def test_this_checkout_comes_before_an_installed_one(tmp_path):
    """Here the other one is installed; so is what the reader's files in the folder are called."""
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    for file in (ROOT / "notebooks").glob("*.py"):
        shutil.copy(file, notebooks)
    for name in "calendar", "httpx", "prefect", "random":
        (notebooks / f"{name}.py").write_text("raise SystemExit('a file of my own')")
    (tmp_path / "pipeline.py").touch()
    done = subprocess.run(
        [sys.executable, "-c", WHERE],
        cwd=notebooks,
        env=os.environ | {"PYTHONPATH": str(ROOT), "LESSONS_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.stderr == ""
    modules, *pipelines = map(str.split, done.stdout.splitlines())
    assert pipelines == 4 * [[str(tmp_path / "pipeline.py")]]
    assert not [file for file in modules if file.startswith(str(tmp_path))]


@pytest.mark.parametrize("script", ["lesson", "gauntlet", "fake_github", "practice_api"])
def test_a_script_finds_what_is_beside_it(tmp_path, script):
    done = subprocess.run(
        [sys.executable, ROOT / "notebooks" / f"{script}.py", "--help"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_flow_of_the_readers_runs_in_another_process(github):
    @flow
    def my_stars(github_repos):
        for repo in github_repos:
            print(f"{repo}: {get_stars(fetch_stats(repo))} stars")

    with lesson.another_process(my_stars, ["dask/dask", "pydantic/pydantic"]) as lines:
        assert github.requests["repository"].tolist()[0] == "dask/dask"
        assert lines == []
    assert [line.split(":")[0] for line in lines] == ["dask/dask", "pydantic/pydantic"]
    assert github.requests["status"].tolist() == [200, 200]

    with pytest.raises(KeyboardInterrupt), lesson.another_process(my_stars, 1000 * ["dask/dask"]):
        raise KeyboardInterrupt
    assert len(github.requests) < 1000
    children = psutil.Process().children()
    assert not [child for child in children if "runs.loaded" in str(child.cmdline())]


DASK = """
import lesson, logging
from distributed import Client

def log_something():
    for name in "worker", "nanny", "gc", "client":
        logging.getLogger(f"distributed.{name}").error("Failed to communicate with scheduler.")

with lesson.dask_cluster(1, 1) as cluster, Client(cluster) as client:
    client.run(log_something)
    client.run(log_something, nanny=True)
log_something()
"""


def test_nothing_of_dasks_log_and_of_the_readers_dask_reaches_a_lesson(tmp_path):
    settings = tmp_path / ".config" / "dask" / "mine.yaml"
    settings.parent.mkdir(parents=True)
    settings.write_text(
        "distributed:\n  comm:\n    require-encryption: true\n"
        "  logging:\n    distributed: debug\nlogging:\n  distributed: debug\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", DASK],
        env=os.environ
        | {"PYTHONPATH": str(ROOT / "notebooks"), "HOME": str(tmp_path)}
        | {"DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION": "true"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)

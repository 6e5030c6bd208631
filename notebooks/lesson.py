"""The set-up cell of every lesson: a Prefect server and a practice API for its kernel.

`start()` prepares a kernel: a Prefect server of the lessons' own, running in the background for all
notebooks, and the practice API, running in a thread of the kernel. Whatever the reader has of
Prefect (a server, a Cloud workspace, variables, settings files) is neither used nor changed.

    python notebooks/lesson.py status     is the background server running, and where?
    python notebooks/lesson.py stop       stop it; what it recorded stays
    python notebooks/lesson.py reset      stop it, and forget all runs, limits and cached results

Everything is kept in one folder, `.lessons`, in `notebooks` or in the folder that the variable
`LESSONS_HOME` names; a relative one begins in `notebooks`.
"""

import json
import logging
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from contextlib import closing, contextmanager, suppress
from copy import copy
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path
from threading import Event, Thread

import httpx
import psutil

# The imports of Prefect, pandas and matplotlib stand where they are used: Prefect reads its
# settings when it is imported, and `status` and `stop` should not wait for any of them.

FOLDER = Path(__file__).resolve().parent
# In a folder of their own, since `reset` removes it.
HOME = (FOLDER / Path(os.environ.get("LESSONS_HOME", "")).expanduser() / ".lessons").resolve()
ADDRESS = HOME / "server.json"  # {"url": …, "pid": …} of the background server
SERVER_LOG = HOME / "server.log"
# The first free one of each: after a restart, the same again. 0 is any.
PORTS = (*range(4269, 4279), 0)  # of the Prefect server
PRACTICE_PORTS = (*range(8787, 8797), 0)
START_UP = 300  # seconds; a server on a fresh home takes 20 to 40, on a busy machine minutes

KERNEL_SETTINGS = {
    "PREFECT_HOME": str(HOME),
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",  # never a second, temporary server
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",  # a task may be called without a flow
    "PREFECT_LOGGING_COLORS": "false",  # of a script that a cell runs
}
# A server on SQLite: one connection, few writes, no feed of events. By default a write that meets
# another one costs two seconds, or up to a minute. Prefect opens one connection for any address
# with ":memory:" in it, and SQLite ignores `label`.
DATABASE = f"{(HOME / 'prefect.db').as_uri()}?uri=true&label=:memory:"
CALM_SERVER = {
    "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{DATABASE}",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "200",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
}


class SetupError(RuntimeError):
    """The set-up failed for a reason that the reader can mend."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows of it: where it was raised helps nobody."""
        return [f"{type(self).__name__}: {self}"]


def isolated(settings: dict[str, str]) -> dict[str, str]:
    """This process's environment with Prefect's variables replaced by `settings`."""
    prefect = "PREFECT_"  # which may be in small letters, too
    others = {name: v for name, v in os.environ.items() if not name.upper().startswith(prefect)}
    return others | settings


# --- The background server ------------------------------------------------------------------------


def server_url(of: str | None = None) -> str | None:
    """The address of the lessons' Prefect server, if it is up (and, if asked, of this version)."""
    # Without `verify` it would load certificates, which takes longer than all the rest.
    options = {"timeout": 5, "trust_env": False, "verify": False}
    try:
        url = json.loads(ADDRESS.read_text())["url"]
        settings = httpx.get(f"{url}/api/admin/settings", **options).json()
        # A server that took over the port of ours, in another checkout, has another home.
        if not HOME.samefile(settings["home"]):
            return None
        if of in (None, httpx.get(f"{url}/api/admin/version", **options).json()):
            return url
    except (OSError, ValueError, KeyError, TypeError, httpx.HTTPError, httpx.InvalidURL):
        pass
    return None


def start_server() -> str:
    """Return the address of the lessons' Prefect server; start it in the background if it is down.

    One of another version than this Python's Prefect is replaced, and what it recorded stays.
    Raises `SetupError` if the folder cannot be written or the server does not come up.
    """
    if url := server_url(version("prefect")):
        return url
    with only_one(HOME):
        return server_url(version("prefect")) or _launch()


def _launch() -> str:
    # One that does not answer, is of another version, or whose start was interrupted: never two.
    stop_server()
    port = free_port(PORTS)
    url = f"http://127.0.0.1:{port}"
    print(f"Starting the Prefect server of the lessons on {url} (half a minute, once) …")
    settings = KERNEL_SETTINGS | CALM_SERVER | {"PREFECT_API_URL": f"{url}/api"}
    command = [sys.executable, "-m", "prefect", "server", "start"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with SERVER_LOG.open("w") as log:
        server = subprocess.Popen(
            command,
            cwd=HOME,
            env=isolated(settings),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Apart from the kernel: interrupting one signals its whole process group.
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
    ADDRESS.write_text(json.dumps({"url": url, "pid": server.pid}))
    deadline = time.monotonic() + START_UP
    while time.monotonic() < deadline and server.poll() is None:
        if server_url():
            return url
        time.sleep(0.1)
    if server.poll() is None:
        raise SetupError(
            f"The Prefect server did not answer within {START_UP} seconds. Run this cell again, "
            f"and if that does not help, see its log, {SERVER_LOG}."
        )
    why = last_words()
    if "Can't locate revision" in why:
        raise SetupError(
            f"A newer Prefect than yours ({version('prefect')}) wrote the history of the lessons: "
            f"install that one again, or forget it with `python {__file__} reset`."
        )
    raise SetupError(f"The Prefect server did not start ({why}). Its log is {SERVER_LOG}.")


def last_words() -> str:
    """Why the server ended, by its log: its last exception, or else its last line."""
    log = SERVER_LOG.read_text(encoding="utf-8", errors="replace").strip()
    errors = re.findall(r"^[\w.]+(?:Error|Exception): .+", log, re.M)
    return (errors or log.splitlines() or ["it said nothing"])[-1]


def stop_server() -> bool:
    """Stop the background server. Returns whether there was one."""
    try:
        server = psutil.Process(json.loads(ADDRESS.read_text())["pid"])
        # A process id can be given out again: end it only if it is ours. In its first moment it has
        # no command line yet, which matters if its start was interrupted just then.
        if not HOME.samefile(server.cwd()) or "prefect" not in (server.cmdline() or ["prefect"]):
            return False
        family = [server, *server.children(recursive=True)]
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return False
    finally:
        with suppress(OSError):  # it may be on a disk that cannot be written
            ADDRESS.unlink()
    end_all(family, 10)
    return True


def end_all(processes: list[psutil.Process], seconds: float) -> None:
    """Ask them to end, and end by force what is still there after so many seconds."""
    for process in filter(is_alive, processes):
        process.terminate()
    if not ended(processes, seconds):
        for process in filter(is_alive, processes):
            process.kill()
        ended(processes, 5)  # Windows keeps their files open until then


def ended(processes: list[psutil.Process], seconds: float) -> bool:
    """Whether all have ended within so many seconds."""
    deadline = time.monotonic() + seconds
    while any(map(is_alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(is_alive, processes))


def is_alive(process: psutil.Process) -> bool:
    """Whether it still runs. One that has ended is kept by the kernel that started it."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@contextmanager
def only_one(folder: Path):
    """Let one process at a time pass. The lock is in the folder; the system lifts a dead one's."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(folder / "lock.db", timeout=START_UP)) as lock:
            lock.execute("BEGIN EXCLUSIVE")
            yield
    except (OSError, sqlite3.OperationalError) as error:
        raise SetupError(
            f"Cannot write to {folder} ({error}). Set LESSONS_HOME to a folder that can be written."
        ) from error


def free_port(candidates: tuple[int, ...]) -> int:
    """The first of the ports that nobody listens on; for 0, one that the system chooses."""
    for port in candidates:
        with socket.socket() as probe:
            if os.name == "posix":  # a port whose connections only linger is free
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise SetupError("No free port on 127.0.0.1.")


# --- The kernel -----------------------------------------------------------------------------------

_github = None
_token = os.environ.get("GITHUB_TOKEN")
# The spelling in small letters is the one in force.
_no_proxy = os.environ.get("no_proxy", os.environ.get("NO_PROXY", ""))
# In the working folder Prefect reads these, if it finds these words.
SETTINGS_FILES = {"prefect.toml": "", "pyproject.toml": "tool.prefect", ".env": "prefect_"}


def isolate() -> None:
    """Let this process and those that it starts use nothing of the reader's own.

    It has to come before anything imports Prefect.
    """
    mine = isolated(KERNEL_SETTINGS)
    for name in set(os.environ) - set(mine):
        del os.environ[name]
    os.environ.update(mine)
    if not Path(os.environ.get("SSL_CERT_FILE", __file__)).is_file():
        del os.environ["SSL_CERT_FILE"]  # every HTTP client would fail
    # Nothing that a library says only now and then, or of which an output must have nothing:
    # matplotlib of its fonts, Dask's scheduler of each connection, Python of an unclosed socket.
    logging.getLogger("matplotlib").setLevel("ERROR")
    os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "error")
    os.environ["DASK_TEMPORARY_DIRECTORY"] = str(HOME)
    if sys.warnoptions:
        warnings.simplefilter("ignore")
    os.environ.pop("PYTHONWARNINGS", None)


def leave_settings_files() -> None:
    """Work in another folder than `notebooks` if Prefect would read settings in there."""
    for name, words in SETTINGS_FILES.items():
        with suppress(OSError):
            text = (FOLDER / name).read_text(encoding="utf-8", errors="replace")
            if words in text.lower() and FOLDER.samefile("."):
                HOME.mkdir(parents=True, exist_ok=True)
                os.chdir(HOME)
                sys.path.append(str(FOLDER))
                os.environ["MATPLOTLIBRC"] = str(FOLDER)


def start():
    """Prepare this kernel for a lesson, and return its practice API (`fake_github.FakeGitHub`).

    Can be run again: what is up is left as it is, what is down is started. Raises `SetupError`.
    """
    global _github
    leave_settings_files()
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "*"  # nothing leaves this machine
    api_url = os.environ["PREFECT_API_URL"] = f"{start_server()}/api"
    import prefect.context
    import prefect.main  # sets up Prefect's logging, which comes before ours
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.settings import get_current_settings

    from fake_github import FakeGitHub

    if get_current_settings().api.url != api_url:  # imported before this module, or it moved
        prefect.context.refresh_global_settings_context()
    # Each flow run would end with a wait of up to a second for the thread of its heartbeat, by
    # which an automation can tell that a run has crashed. No variable can say that there is none.
    get_current_settings().flows.heartbeat_frequency = None
    plain_logs()
    for port in PRACTICE_PORTS:
        if _github is None:
            api = FakeGitHub(latency=0.1, rate_limit=5000, port=port)
            with suppress(OSError):  # taken, perhaps by another kernel a moment ago
                _github = api.start()
    os.environ["GITHUB_API_URL"] = _github.url
    os.environ.pop("GITHUB_TOKEN", None)  # the reader's own is not for practice
    # Another kernel may create it at the same moment.
    with prefect.get_client(sync_client=True) as client, suppress(ObjectAlreadyExists):
        client.upsert_global_concurrency_limit_by_name("github-api", 5000, 5000 / 3600)
    # Prefect's own logging, set up by now, lets uvicorn report a stranger's request into the cell.
    logging.getLogger("uvicorn").setLevel("CRITICAL")
    print(f"Prefect dashboard  {os.environ['PREFECT_API_URL'].removesuffix('/api')}")
    print(f"Practice API       {_github.url}")
    return _github


def go_live() -> None:
    """From here on ask GitHub itself, with the reader's `GITHUB_TOKEN` if there is one.

    The practice limit `github-api` goes too: the pipeline creates the one that GitHub's allowance
    asks for. `start()` returns to practice.
    """
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = f"{_no_proxy},127.0.0.1,localhost".strip(",")
    try:
        delete_limit("github-api")
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        raise SetupError(f"A proxy that your environment names cannot be used: {error}") from None
    os.environ.pop("GITHUB_API_URL", None)
    if _token:
        os.environ["GITHUB_TOKEN"] = _token
    has = "with" if os.environ.get("GITHUB_TOKEN") else "without"
    print("From here on: https://api.github.com", has, "a token")


SHORTER = {  # what Prefect and httpx say in too many words for the width of a cell
    r" for url '[^']*'|(\\n|\n)For more information check: [^\s'\")]+": "",
    r"(Task|Flow) run encountered an exception:? |Task run failed with exception: ": "",
    r"HTTPStatusError\([\"'](Client|Server) error '([^']*)'[\"']\)": r"\2",
    r"HTTPStatusError: (Client|Server) error '([^']*)'": r"\2",
    r" will start (\d+(\.\d)?)\d* second\(s\) from now": r" in \1 seconds",
    r"\\n": "; ",
}
REPEATED = r"(?s)Encountered exception during|Task run failed with exception(?!.*Retr)"


def plain_logs() -> None:
    """Log a line for each record to the cell's output; tracebacks go to Prefect's server only.

    A failure is told once, by the line of the state that it leads to.
    """
    from prefect.logging.formatters import PrefectFormatter

    class OneLine(PrefectFormatter):
        def format(self, record):
            if record.msg.startswith("View at"):  # the address alone just fits into a line
                return record.getMessage()
            record = copy(record)
            record.exc_info = record.exc_text = None
            text = super().format(record)
            for pattern, shorter in SHORTER.items():
                text = re.sub(pattern, shorter, text)
            return text

    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        OneLine(
            "%(asctime)s | %(levelname)-7s | %(message)s",
            datefmt="%H:%M:%S",
            flow_run_fmt="%(asctime)s | %(levelname)-7s | %(flow_run_name)s | %(message)s",
            task_run_fmt="%(asctime)s | %(levelname)-7s | %(task_run_name)s | %(message)s",
        )
    )
    handler.addFilter(lambda record: not re.match(REPEATED, record.getMessage()))
    logging.getLogger().handlers[:] = [handler]


@contextmanager
def quiet():
    """Within it, no log lines are shown; Prefect's server gets them all the same."""
    handlers, nothing = list(logging.getLogger().handlers), lambda record: False
    for handler in handlers:
        handler.addFilter(nothing)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(nothing)


def task_states(flow_state, count: int) -> dict[str, str]:
    """The states of a flow run's `count` task runs by name, as Prefect's server recorded them.

    It records them in batches, a moment later than they happen, and tells of 200 at once. Raises
    `TimeoutError` if it does not have them within half a minute.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter

    flow_run = FlowRunFilter(id={"any_": [flow_state.state_details.flow_run_id]})
    deadline = time.monotonic() + 30
    with get_client(sync_client=True) as client:
        while time.monotonic() < deadline:
            runs = client.read_task_runs(flow_run_filter=flow_run)
            if len(runs) == count and all(run.state.is_final() for run in runs):
                return {run.name: run.state.name for run in runs}
            time.sleep(0.1)
    raise TimeoutError(f"Prefect's server has {len(runs)} of {count} finished task runs.")


def new_limit(name: str, limit: int, slot_decay_per_second: float) -> None:
    """Create a global concurrency limit with all its slots free, in place of one of that name."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate

    delete_limit(name)
    with get_client(sync_client=True) as client:
        client.create_global_concurrency_limit(
            GlobalConcurrencyLimitCreate(
                name=name, limit=limit, slot_decay_per_second=slot_decay_per_second
            )
        )


def delete_limit(name: str) -> None:
    """Delete a global concurrency limit, if there is one of that name."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client, suppress(ObjectNotFound):
        client.delete_global_concurrency_limit_by_name(name)


def switch_off_limit(name: str) -> None:
    """Make a global concurrency limit inactive, as `prefect gcl disable NAME` does."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate

    with get_client(sync_client=True) as client:
        client.update_global_concurrency_limit(name, GlobalConcurrencyLimitUpdate(active=False))


@contextmanager
def watch_slots(name: str):
    """Look at a limit ten times a second, until all its slots are free again after the block.

    Yields a list that fills up with (seconds, free slots); `charts.slots` draws it. Gives up half a
    minute after the block.
    """
    from prefect.client.orchestration import get_client

    seen, enough, start = [], Event(), time.monotonic()

    def look():
        with get_client(sync_client=True) as client:
            while not enough.wait(0.1):
                limit = client.read_global_concurrency_limit_by_name(name)
                seen.append((time.monotonic() - start, limit.limit - limit.active_slots))

    watcher = Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield seen
        deadline = time.monotonic() + 30
        while seen and seen[-1][1] < seen[0][1] and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(0.5)  # so that the full jar can be seen
    finally:
        enough.set()
        watcher.join()


@contextmanager
def another_process(github_repos: list[str]):
    """Run `python pipeline.py` with these repositories in another process, beside the block.

    The block begins with that process's first request, and ends after the process. Yields a list
    that has by then the lines that it printed.
    """
    lines, command = [], [sys.executable, "-m", "pipeline", *github_repos]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, **output) as process:
        try:
            while _github.requests.empty and process.poll() is None:
                time.sleep(0.05)
            yield lines
            lines += process.communicate()[0].splitlines()
        finally:
            process.terminate()  # if the block was interrupted; else it has ended


def clear_cache() -> None:
    """Forget all cached results, so that the next run has to ask the API."""
    shutil.rmtree(HOME / "storage", ignore_errors=True)


def saved_files() -> list[Path]:
    """The files in which Prefect keeps results, one each."""
    return list((HOME / "storage").glob("*"))


def show_code(*things, only: str = "") -> None:
    """Print the source of tasks, flows or functions, without their docstrings.

    A string names something that pipeline.py assigns, such as "resilient_fetch_stats". With `only`
    just the lines are printed in which that pattern is found.
    """
    import inspect

    sources = []
    for thing in things:
        if isinstance(thing, str):
            import pipeline

            module = inspect.getsource(pipeline)
            [source] = re.findall(rf"^{thing} = .*\n(?:[ )].*\n)*", module, re.M)
        else:
            source = textwrap.dedent(inspect.getsource(getattr(thing, "fn", thing)))
            source = re.sub(r'^ *""".*?"""\n', "", source, count=1, flags=re.S | re.M)
        lines = source.splitlines(keepends=True)
        sources.append("".join(line for line in lines if re.search(only, line)))
    print("\n\n".join(sources), end="")


# --- Other processes (lesson 7) -------------------------------------------------------------------


def dask_cluster(workers: int = 2, threads: int = 2, env: dict[str, str] | None = None):
    """Dask's `LocalCluster` with so many worker processes, which do not log into the notebook.

    env: variables for the workers' environment
    """
    from distributed import LocalCluster

    with quiet():
        return LocalCluster(
            n_workers=workers,
            threads_per_worker=threads,
            dashboard_address="127.0.0.1:0",  # a free port
            local_directory=HOME,
            env={"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL"} | (env or {}),
        )


@contextmanager
def task_stream(cluster):
    """Give a list that has, at the end of the block, what Dask recorded: who did what, when."""
    from distributed import Client, get_task_stream

    done = []
    with Client(cluster, set_as_default=False) as client, get_task_stream(client) as stream:
        yield done
    done += stream.data


def serve_and_run(script: str, name: str):
    """Start a script that serves a deployment, run the deployment once, and stop the script.

    Returns the flow run and the deployment, as they are then. Raises `RuntimeError` if the script
    ends by itself, and `TimeoutError` after two minutes.
    """
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    # It looks for work every second instead of every ten, and keeps its files with the lessons.
    settings = {"PREFECT_RUNNER_POLL_FREQUENCY": "1", "TMPDIR": str(HOME)}
    with (
        get_client(sync_client=True) as prefect,
        tempfile.TemporaryFile() as words,
        subprocess.Popen(
            [sys.executable, "-c", script],
            env=os.environ | settings,
            stdout=words,
            stderr=subprocess.STDOUT,
        ) as serving,
    ):
        process = psutil.Process(serving.pid)

        def wait_for(done):
            deadline = time.monotonic() + 120
            while not (result := done()):
                if serving.poll() is not None:
                    words.seek(0)
                    raise RuntimeError(f"The script has ended. {words.read().decode()[-1000:]}")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{name} took more than two minutes.")
                time.sleep(0.2)
            return result

        def deployment():
            with suppress(ObjectNotFound):
                return prefect.read_deployment_by_name(name)

        def at_rest():
            with suppress(psutil.Error):
                commands = [child.cmdline() for child in process.children() if is_alive(child)]
                return not any("spawn_main" in str(command) for command in commands)

        try:
            run = prefect.create_flow_run_from_deployment(wait_for(deployment).id)
            wait_for(lambda: prefect.read_flow_run(run.id).state.is_final())
            wait_for(at_rest)  # when it stops, it cancels runs whose process is still there
        finally:
            family = [process, *process.children(recursive=True)] if serving.poll() is None else []
            serving.terminate()
            if not ended(family, 30):
                end_all(family, 0)
        return prefect.read_flow_run(run.id), deployment()


def webhook() -> tuple[str, list[str]]:
    """Start a server that takes what a hook posts, as Slack does, in a thread of the kernel.

    Returns its address and a list, to which it adds the text of each message.
    """
    heard = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self):
            message = self.rfile.read(int(self.headers["content-length"]))
            heard.append(json.loads(message)["text"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments):
            """Nothing of it in a cell."""

    server = HTTPServer(("127.0.0.1", 0), Receiver)
    Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}", heard


def delete_deployment(name: str) -> None:
    """Delete a deployment, with the runs that its schedule has planned, if there is one."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client, suppress(ObjectNotFound):
        client.delete_deployment(client.read_deployment_by_name(name).id)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["status", "stop", "reset"])
    command = parser.parse_args().command
    if command == "status":
        print(server_url() or "The Prefect server of the lessons is not running.")
        return
    print("Stopped." if stop_server() else "It was not running.")
    if command == "reset" and HOME.exists():
        try:
            shutil.rmtree(HOME)
        except OSError as error:
            sys.exit(f"Cannot remove {HOME} ({error}).")
        print(f"Removed {HOME}.")


if __name__ == "__main__":
    main()
else:
    isolate()

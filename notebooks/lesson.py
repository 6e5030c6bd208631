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

import os
import sys

# A file of the reader's, in the working folder or beside this one, may have the name of a module:
# so these two folders come last. This checkout comes before one that is installed.
sys.path.append(os.path.dirname(os.path.realpath(__file__)))
sys.path.sort(key=lambda path: path in ("", os.path.dirname(os.path.realpath(__file__))))
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

import json
import logging
import pickle
import re
import shutil
import subprocess
import tempfile
import textwrap
import time
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from contextlib import contextmanager, suppress
from copy import copy
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from zlib import crc32

import httpx
import psutil

import __main__
from background import (
    FOLDER,
    HOME,
    SETTINGS,
    SetupError,
    end_all,
    ended,
    is_alive,
    isolated,
    only_one,  # noqa: F401  (for others)
    server_url,
    start_server,
    stop_server,
    writing,
)

# The imports of Prefect, pandas and matplotlib stand where they are used: Prefect reads its
# settings when it is imported, and `status` and `stop` should not wait for any of them.

PRACTICE_PORTS = (*range(8787, 8797), 0)  # the first free one; 0 is any
USUAL = (5000, 5000 / 3600)  # slots of `github-api`, and how many become free a second
SILENT = 60  # a level above all of Python's
# Those to which Dask gives a level, each.
DASK_LOGGERS = "distributed", "distributed.client", "distributed.gc", "tornado.application"

# --- The kernel -----------------------------------------------------------------------------------


def results_of(notebook: str) -> Path:
    """The folder of a notebook's cached results: each has its own."""
    name = re.sub(r"\W", "_", Path(notebook).stem)[:40]
    return HOME / "storage" / f"{name}-{crc32(os.fsencode(notebook)):08x}"


# The notebook's path, as JupyterLab or VS Code tells it, or else the command of this process: that
# of a kernel stays the same when it is restarted.
STORAGE = results_of(
    os.environ.get("JPY_SESSION_NAME")
    or vars(__main__).get("__vsc_ipynb_file__")
    or " ".join(sys.argv)
)
# In place of the reader's own. Processes that a kernel starts find its results.
KERNEL_SETTINGS = SETTINGS | {
    "DO_NOT_TRACK": "1",  # else a `!prefect …` of a cell begins with a notice
    "PREFECT_LOCAL_STORAGE_PATH": str(STORAGE),
    "DASK_TEMPORARY_DIRECTORY": str(HOME),
    "DASK_DISTRIBUTED__LOGGING": str(dict.fromkeys(DASK_LOGGERS, SILENT)),
}

_github = None
# An address and its token belong together.
_api_url, _token = os.environ.get("GITHUB_API_URL"), os.environ.get("GITHUB_TOKEN")
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
    # Processes that this one starts take `pipeline` from this checkout, too.
    others = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([str(FOLDER.parent), *others]))
    # Nothing that a library says only now and then, or of which an output must have nothing:
    # matplotlib of its fonts, Python of an unclosed socket.
    logging.getLogger("matplotlib").setLevel("ERROR")
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
                os.environ["MATPLOTLIBRC"] = str(FOLDER)


def start():
    """Prepare this kernel for a lesson, and return its practice API (`fake_github.FakeGitHub`).

    Can be run again: what is up is left as it is, what is down is started. Raises `SetupError`.
    """
    global _github
    leave_settings_files()
    live = _github and os.environ.get("GITHUB_API_URL") != _github.url
    with writing(HOME):  # the server may be up, and another user's
        STORAGE.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=STORAGE).close()
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "*"  # nothing leaves this machine
    api_url = os.environ["PREFECT_API_URL"] = f"{start_server()}/api"
    import prefect.context
    import prefect.main  # sets up Prefect's logging, which comes before ours
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
    if live:  # until now: the limit is the pipeline's own, for GitHub
        usual_limit()
    os.environ["GITHUB_API_URL"] = _github.url
    os.environ.pop("GITHUB_TOKEN", None)  # the reader's own is not for practice
    # Prefect's own logging, set up by now, lets uvicorn report a stranger's request into the cell.
    logging.getLogger("uvicorn").setLevel("CRITICAL")
    print(f"Prefect dashboard  {os.environ['PREFECT_API_URL'].removesuffix('/api')}")
    print(f"Practice API       {_github.url}")
    keep_limit()
    return _github


def keep_limit() -> None:
    """Create the limit `github-api` if it is missing. One that exists may be in use: say so."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

    with get_client(sync_client=True) as client, suppress(ObjectNotFound):
        with suppress(ObjectAlreadyExists):
            create_limit(client, "github-api", *USUAL)
        # Another kernel may replace it at this moment.
        limit = client.read_global_concurrency_limit_by_name("github-api")
        if (limit.limit, limit.slot_decay_per_second, limit.active) != (*USUAL, True):
            size = f"{limit.limit} slots, {limit.slot_decay_per_second:.3g} a second"
            size += "" if limit.active else ", inactive"
            print(f"Limit github-api   {size}. Not in use? lesson.usual_limit() restores it.")


def go_live() -> None:
    """From here on send requests to GitHub, with the reader's `GITHUB_TOKEN` if there is one.

    If the reader had a `GITHUB_API_URL`, they go there: the token is for that address. The practice
    limit `github-api` goes: the pipeline creates the one for GitHub's rate limit. `start()` returns
    to practice.
    """
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = f"{_no_proxy},127.0.0.1,localhost".strip(",")
    try:
        delete_limit("github-api")
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        raise SetupError(f"A proxy that your environment names cannot be used: {error}") from None
    os.environ.pop("GITHUB_API_URL", None)
    mine = {"GITHUB_API_URL": _api_url, "GITHUB_TOKEN": _token}
    os.environ.update({name: value for name, value in mine.items() if value})
    address = (_api_url or "https://api.github.com").rpartition("@")[2]  # without a password
    has = "with" if os.environ.get("GITHUB_TOKEN") else "without"
    print(f"From here on: {address} {has} a token")


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
    for logger in logging.getLogger(), logging.getLogger("prefect._internal"):
        logger.handlers[:] = [handler]


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
    from prefect.exceptions import ObjectAlreadyExists

    with get_client(sync_client=True) as client:
        while True:
            delete_limit(name)
            with suppress(ObjectAlreadyExists):  # a set-up cell in another kernel was faster
                return create_limit(client, name, limit, slot_decay_per_second)


def create_limit(client, name: str, limit: int, slot_decay_per_second: float) -> None:
    from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate

    size = {"limit": limit, "slot_decay_per_second": slot_decay_per_second}
    client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, **size))


def usual_limit() -> None:
    """Restore the limit `github-api` of the lessons, which holds nobody back."""
    new_limit("github-api", *USUAL)


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
def another_process(flow, github_repos: list[str]):
    """Run a flow with these repositories in another process, beside the block.

    The block begins with that process's first request, and ends after the process. Yields a list
    that has by then the lines that it printed.
    """
    import runs

    # By its path it finds what the flow imports, and `runs`.
    code = """if True:
        import pickle, sys
        sys.path[:] = pickle.load(sys.stdin.buffer)
        import runs
        flow, github_repos = pickle.load(sys.stdin.buffer)
        runs.loaded(flow)(github_repos)
    """
    lines, job = [], [sys.path, (runs.portable(flow), github_repos)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with psutil.Popen([sys.executable, "-P", "-c", code], **pipes) as process:
        try:
            process.stdin.write(b"".join(map(pickle.dumps, job)))
            process.stdin.flush()
            while _github.requests.empty and process.poll() is None:
                time.sleep(0.05)
            yield lines
            lines += process.communicate()[0].decode().splitlines()
        finally:
            end_all([process], 5)  # if the block was interrupted; else it has ended


@contextmanager
def stop_button(after: float):
    """Press ■ for the reader, so many seconds after the first request of the block; end quietly.

    Yields a namespace that has, after the block, `sent`, how many requests there were by then, and
    `seconds`, for how long the block went on. Raises `KeyboardInterrupt` if the reader presses ■.
    """
    import runs

    stop, over = SimpleNamespace(sent=0, seconds=0.0, at=None), Event()

    def press():
        while _github.requests.empty and not over.wait(0.05):
            pass
        if not over.wait(after):
            stop.sent, stop.at = len(_github.requests), time.monotonic()
            runs.interrupt_main_thread()

    finger = Thread(target=press, daemon=True)
    finger.start()
    try:
        yield stop
    except KeyboardInterrupt:
        if stop.at is None:
            raise
        stop.seconds = time.monotonic() - stop.at
    finally:
        over.set()
        finger.join()


def clear_cache() -> None:
    """Forget this notebook's cached results, so that the next run sends its requests."""
    shutil.rmtree(STORAGE, ignore_errors=True)


def saved_files() -> list[Path]:
    """The files in which Prefect keeps this notebook's results, one each."""
    return list(STORAGE.glob("*"))


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
    import dask
    from distributed import LocalCluster

    dask.config.refresh(paths=[])  # without the reader's files
    with quiet():
        return LocalCluster(
            n_workers=workers,
            threads_per_worker=threads,
            dashboard_address="127.0.0.1:0",  # a free port
            local_directory=HOME,
            silence_logs=SILENT,
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
            [sys.executable, "-P", "-c", script],
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
    try:
        print("Stopped." if stop_server() else "It was not running.")
        if command == "reset" and HOME.exists():
            shutil.rmtree(HOME)
            print(f"Removed {HOME}.")
    except SetupError as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(f"Cannot remove {HOME} ({error}).")


if __name__ == "__main__":
    main()
else:
    isolate()

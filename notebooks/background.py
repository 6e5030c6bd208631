"""The Prefect server of the lessons: one for all notebooks, running in the background.

`start_server()` returns its address and starts it if it is down. `lesson.py` is the set-up cell on
top of it, and the command `python notebooks/lesson.py status|stop|reset`.
"""

import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import ExitStack, closing, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import httpx
import psutil

FOLDER = Path(__file__).resolve().parent
# In a folder of their own, since `reset` removes it.
HOME = (FOLDER / Path(os.environ.get("LESSONS_HOME", "")).expanduser() / ".lessons").resolve()
ADDRESS = HOME / "server.json"  # {"url": …, "pid": …} of the background server
SERVER_LOG = HOME / "server.log"
PORTS = (*range(4269, 4279), 0)  # the first free one: after a restart, the same again; 0 is any
START_UP = 300  # seconds; a server on a fresh home takes 20 to 40, on a busy machine minutes

SETTINGS = {  # of kernels, of what they start, and of the server
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
    """This process's environment with Prefect's and Dask's variables replaced by `settings`."""
    theirs = "PREFECT_", "DASK_"  # which may be in small letters, too
    others = {name: v for name, v in os.environ.items() if not name.upper().startswith(theirs)}
    return others | settings


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
    others = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    settings = {
        "PREFECT_API_URL": f"{url}/api",
        "PREFECT_UI_API_URL": "/api",  # the dashboard may be forwarded to another address
        # No file of the reader's shadows a module of the server's.
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": os.pathsep.join(path for path in others if path != str(FOLDER.parent)),
    }
    command = [sys.executable, "-m", "prefect", "server", "start"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with writing(HOME):
        log = SERVER_LOG.open("w")
    try:
        with log:
            server = subprocess.Popen(
                command,
                cwd=HOME,
                env=isolated(SETTINGS | CALM_SERVER | settings),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Apart from the kernel: interrupting one signals its whole process group.
                start_new_session=True,
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
            )
    except OSError as error:
        raise SetupError(
            f"This kernel's Python cannot be started any more ({error}). Install it again, or "
            "choose another kernel."
        ) from error
    with writing(HOME):
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
            f"install that one again, or forget it with `python {FOLDER / 'lesson.py'} reset`."
        )
    raise SetupError(f"The Prefect server did not start ({why}). Its log is {SERVER_LOG}.")


def last_words() -> str:
    """Why the server ended, by its log: its last exception, or else its last line."""
    log = SERVER_LOG.read_text(encoding="utf-8", errors="replace").strip()
    errors = re.findall(r"^[\w.]+(?:Error|Exception): .+", log, re.M)
    return (errors or log.splitlines() or ["it said nothing"])[-1]


def stop_server() -> bool:
    """Stop the background server. Returns whether there was one.

    Raises `SetupError` if it is another user's.
    """
    family = []
    with suppress(OSError, ValueError, KeyError, TypeError, psutil.Error):
        server = psutil.Process(json.loads(ADDRESS.read_text())["pid"])
        # A process id can be given out again: end it only if it is ours. In its first moment it has
        # no command line yet, which matters if its start was interrupted just then.
        if HOME.samefile(server.cwd()) and "prefect" in (server.cmdline() or ["prefect"]):
            family = [server, *server.children(recursive=True)]
    if not family and (url := server_url()):
        raise SetupError(
            f"The Prefect server on {url} is another user's. Set LESSONS_HOME to a folder of your "
            "own."
        )
    with suppress(OSError):  # it may be on a disk that cannot be written
        ADDRESS.unlink()
    end_all(family, 10)
    return bool(family)


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
    with ExitStack() as stack:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = sqlite3.connect(folder / "lock.db", timeout=START_UP)
            stack.enter_context(closing(lock)).execute("BEGIN EXCLUSIVE")
        yield


@contextmanager
def writing(folder: Path):
    """Raise a `SetupError` if the block cannot write to the folder."""
    try:
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

"""Runs of a flow, each in a new process, as if somebody had started it from a terminal.

To import Prefect takes seconds. On Linux one process that has imported it waits, and forks for each
run, which then starts at once; elsewhere, where a fork is not safe, each run imports it anew.

What a run and its starter have to say to each other is in a folder: `job`, `output`, `result`, and
`interrupt` as soon as the run should be interrupted.
"""

import _thread
import asyncio
import atexit
import copyreg
import importlib
import inspect
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from threading import Lock, Thread, main_thread

FORKS = sys.platform == "linux"  # macOS's libraries may not stand it, Windows has no fork
# A lock of the reader's cell, also the one in an `Event`, is a new one in another process.
copyreg.pickle(_thread.LockType, lambda _: (_thread.allocate_lock, ()))
copyreg.pickle(_thread.RLock, lambda _: (_thread.RLock, ()))


# --- In the process that starts runs --------------------------------------------------------------


def portable(flow) -> tuple[str, str] | bytes:
    """The flow for another process: its module and its name there, or all of it if it has none.

    Raises `TypeError`, in one sentence, if it is no flow or cannot be sent.
    """
    import cloudpickle
    from prefect import Flow

    if not isinstance(flow, Flow):
        kind = "a function without it" if inspect.isfunction(flow) else repr(type(flow).__name__)
        raise TypeError(f"The gauntlet takes a flow, a function with @flow above it, not {kind}.")
    module = sys.modules.get(flow.fn.__module__)
    if flow.fn.__module__ != "__main__" and getattr(module, "__file__", None):
        for name, value in vars(module).items():
            if value is flow:
                return flow.fn.__module__, name
    try:
        return cloudpickle.dumps(flow)
    except Exception as error:
        raise TypeError(
            f"The flow cannot be sent to another process ({error}). Let it use neither `github` "
            "nor a client made outside of it; in a module of its own it may."
        ) from None


class Performance:
    """A run of a flow in a process of its own; when the `with` ends, the process has ended, too."""

    def __init__(self, flow: tuple[str, str] | bytes, names: list[str], environment: dict):
        from prefect.context import get_settings_context

        self.job = {
            "flow": flow,
            "names": names,
            "environment": dict(os.environ) | environment,
            "settings": get_settings_context(),
            "path": sys.path,
            "folder": os.getcwd(),
        }

    def __enter__(self) -> "Performance":
        self.files = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.folder = Path(self.files.name)
        (self.folder / "job").write_bytes(pickle.dumps(self.job))
        self.processes = start(self.folder)
        return self

    def __exit__(self, *_) -> None:
        import lesson

        for process in filter(lesson.is_alive, self.processes):
            process.kill()
        lesson.ended(self.processes, 10)
        self.files.cleanup()

    def result(self) -> tuple[str, str] | None:
        """The type of the run's state and the name of its error; None while it runs."""
        ended = self.ended()
        with suppress(FileNotFoundError):
            state, error = json.loads((self.folder / "result").read_text())
            if not state:
                raise TypeError(f"A new process cannot load the flow: {error}")
            return state, error
        return ("CRASHED", "its process ended") if ended else None

    def ended(self, seconds: float = 0) -> bool:
        """Whether its process has ended within so many seconds."""
        import lesson

        return lesson.ended(self.processes, seconds)

    def interrupt(self) -> None:
        """Do what ■ in JupyterLab does."""
        (self.folder / "interrupt").touch()

    def printed(self) -> str:
        with suppress(FileNotFoundError):
            return (self.folder / "output").read_text(encoding="utf-8", errors="replace")
        return ""


def start(folder: Path) -> list:
    """Start the process of a run: a list of it, empty if it has already ended."""
    import psutil

    if not FORKS:
        return [psutil.Popen([sys.executable, __file__, folder], stdin=subprocess.DEVNULL)]
    with suppress(psutil.NoSuchProcess):
        return [psutil.Process(forks.fork(folder))]
    return []


class Forks:
    """The process that has imported Prefect, and forks. When this one ends, all of them do."""

    def __init__(self):
        self.process, self.turn = None, Lock()

    def fork(self, folder: Path) -> int:
        """Start a run. Returns the id of its process."""
        with self.turn:
            if self.process is None or self.process.poll() is not None:
                self.process = subprocess.Popen(
                    [sys.executable, __file__],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    start_new_session=True,  # an interrupt of this process is not for the runs
                )
            print(folder, file=self.process.stdin, flush=True)
            return int(self.process.stdout.readline())

    def end(self) -> None:
        if self.process is not None:
            self.process.communicate()


forks = Forks()
atexit.register(forks.end)


# --- In the process of a run ----------------------------------------------------------------------


def perform(folder: Path) -> None:
    """Run the flow in this process; tell its state's type and its error's name."""
    output = os.open(folder / "output", os.O_CREAT | os.O_WRONLY)
    for number, file in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
        os.dup2(file, number)
    sys.stdout.reconfigure(encoding="utf-8", line_buffering=True)
    job = pickle.loads((folder / "job").read_bytes())
    os.environ.clear()  # this process may be a fork of an older one
    os.environ.update(job["environment"])
    os.chdir(job["folder"])
    sys.path[:] = job["path"]
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, signal.default_int_handler)
    Thread(target=obey, args=(folder,), daemon=True).start()
    state, error = outcome(job)
    (folder / "unfinished").write_text(json.dumps([state, error]))
    os.replace(folder / "unfinished", folder / "result")
    sys.stdout.flush()
    # Before all that was registered earlier, and after Prefect's threads have sent what they have.
    atexit.register(os._exit, 0)


def outcome(job: dict) -> tuple[str, str]:
    """The type of the flow run's state, "" if there is no flow, and the name of its error."""
    import prefect.context

    # Those that the starter has now, with what `lesson.start` sets.
    prefect.context.GLOBAL_SETTINGS_CONTEXT = job["settings"]
    # Log lines count as printed: the flow may have `log_prints=True`.
    logging.getLogger().handlers[:] = [logging.StreamHandler(sys.stdout)]
    try:
        flow = loaded(job["flow"])
    except Exception as error:
        return "", f"{type(error).__name__}: {error}"
    try:
        state = flow(job["names"], return_state=True)
        if inspect.iscoroutine(state):
            state = asyncio.run(state)
        error = state.result(raise_on_failure=False)
        return state.type.value, type(error).__name__ if isinstance(error, BaseException) else ""
    except BaseException as error:
        return "CRASHED", type(error).__name__


def loaded(flow: tuple[str, str] | bytes):
    if isinstance(flow, bytes):
        return pickle.loads(flow)
    module, name = flow
    return getattr(importlib.import_module(module), name)


def obey(folder: Path) -> None:
    while not (folder / "interrupt").exists():
        time.sleep(0.05)
    interrupt_main_thread()


def interrupt_main_thread() -> None:
    """Do in this process what ■ in JupyterLab does in a kernel."""
    if sys.platform == "win32":
        _thread.interrupt_main()
    else:
        signal.pthread_kill(main_thread().ident, signal.SIGINT)


def fork_for_each() -> None:
    """Fork for each folder that comes, until nobody can send one any more; then all end."""
    import cloudpickle  # noqa: F401
    import fastapi  # noqa: F401
    import prefect.flow_engine
    import prefect.task_engine
    import prefect.utilities.visualization  # noqa: F401  (these come only with the first flow run)

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a fork
    while folder := sys.stdin.readline().strip():
        if not (fork := os.fork()):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            perform(Path(folder))
            return
        print(fork, flush=True)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    perform(Path(sys.argv[1])) if sys.argv[1:] else fork_for_each()

"""The set-up cell of every lesson, and the charts that lessons share.

`start()` prepares a kernel: a Prefect server of the lessons' own, running in the background for all
notebooks, and the practice API, running in a thread of the kernel. Whatever the reader has of
Prefect (a server, a Cloud workspace, `PREFECT_*` variables) is neither used nor changed.

    python notebooks/lesson.py status     is the background server running, and where?
    python notebooks/lesson.py stop       stop it; what it recorded stays
    python notebooks/lesson.py reset      stop it, and forget all runs, limits and cached results

Everything is kept in one folder, `notebooks/.prefect`, or in `LESSONS_HOME` if that is set.
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
import textwrap
import time
from contextlib import closing, contextmanager, suppress
from copy import copy
from pathlib import Path

import httpx
import psutil

# The imports of Prefect, pandas and matplotlib stand where they are used: Prefect reads its
# settings when it is imported, and `status` and `stop` should not wait for any of them.

HOME = Path(os.environ.get("LESSONS_HOME") or Path(__file__).with_name(".prefect")).resolve()
ADDRESS = HOME / "server.json"  # {"url": …, "pid": …} of the background server
SERVER_LOG = HOME / "server.log"
PORTS = (4269, 0)  # of the Prefect server; 0 is any free one
PRACTICE_PORTS = (*range(8787, 8797), 0)  # the first free one: after a restart, the same again
START_UP = 120  # seconds; a server on a fresh home takes 20 to 40

KERNEL_SETTINGS = {
    "PREFECT_HOME": str(HOME),
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",  # never a second, temporary server
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",  # a task may be called without a flow
    "PREFECT_LOGGING_COLORS": "false",  # of a script that a cell runs
}
SERVER_SETTINGS = KERNEL_SETTINGS | {
    # Writes in batches, over one connection to the database: without it, `rate_limit()` waits two
    # seconds whenever another write comes between its read and its write. Prefect opens a single
    # connection for any address with ":memory:" in it. SQLite ignores the parameter `label`; the
    # database is a file, in the folder in which the server is started.
    "PREFECT_SERVER_DATABASE_CONNECTION_URL": (
        "sqlite+aiosqlite:///file:prefect.db?uri=true&label=:memory:"
    ),
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "200",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "200",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_BATCH_SIZE": "200",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_READ_BATCH_SIZE": "200",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_FLUSH_INTERVAL": "1",
}


class SetupError(RuntimeError):
    """The set-up failed for a reason that the reader can mend."""


def isolated(settings: dict[str, str]) -> dict[str, str]:
    """This process's environment with Prefect's variables replaced by `settings`."""
    others = {name: v for name, v in os.environ.items() if not name.startswith("PREFECT_")}
    return others | settings


# --- The background server ------------------------------------------------------------------------


def server_url() -> str | None:
    """The address of the lessons' Prefect server, if it is up."""
    try:
        url = json.loads(ADDRESS.read_text())["url"]
        # Without `verify` it would load certificates, which takes longer than all the rest.
        options = {"timeout": 5, "trust_env": False, "verify": False}
        settings = httpx.get(f"{url}/api/admin/settings", **options).json()
        # A server that took over the port of ours, in another checkout, has another home.
        return url if settings["home"] == str(HOME) else None
    except (OSError, ValueError, KeyError, TypeError, httpx.HTTPError, httpx.InvalidURL):
        return None


def start_server() -> str:
    """Return the address of the lessons' Prefect server; start it in the background if it is down.

    Raises `SetupError` if the folder cannot be written or the server does not come up.
    """
    if url := server_url():
        return url
    with only_one():
        return server_url() or _launch()


def _launch() -> str:
    stop_server()  # one that does not answer, or whose start was interrupted: never two on one home
    port = free_port(PORTS)
    url = f"http://127.0.0.1:{port}"
    print(f"Starting the Prefect server of the lessons on {url} (half a minute, once) …")
    command = [sys.executable, "-m", "prefect", "server", "start"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with SERVER_LOG.open("w") as log:
        server = subprocess.Popen(
            command,
            cwd=HOME,
            env=isolated(SERVER_SETTINGS | {"PREFECT_API_URL": f"{url}/api"}),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # A session of its own: interrupting a kernel signals the kernel's whole process group.
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
    ADDRESS.write_text(json.dumps({"url": url, "pid": server.pid}))
    deadline = time.monotonic() + START_UP
    while time.monotonic() < deadline and server.poll() is None:
        if server_url():
            return url
        time.sleep(0.1)
    raise SetupError(f"The Prefect server did not start. Its last words are in {SERVER_LOG}.")


def stop_server() -> bool:
    """Stop the background server. Returns whether there was one."""
    try:
        server = psutil.Process(json.loads(ADDRESS.read_text())["pid"])
        # A process id can be given out again: end it only if it is ours. In its first moment it has
        # no command line yet, which matters if its start was interrupted just then.
        if server.cwd() != str(HOME) or "prefect" not in (server.cmdline() or ["prefect"]):
            return False
        family = [server, *server.children(recursive=True)]
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return False
    finally:
        ADDRESS.unlink(missing_ok=True)
    for process in filter(is_alive, family):
        process.terminate()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(map(is_alive, family)):
        time.sleep(0.05)
    for process in filter(is_alive, family):
        process.kill()
    return True


def is_alive(process: psutil.Process) -> bool:
    """Whether it still runs. One that has ended is kept by the kernel that started it."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@contextmanager
def only_one():
    """Let one process at a time pass. The system lifts the lock of a process that dies."""
    try:
        HOME.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(HOME / "lock.db", timeout=START_UP)) as lock:
            lock.execute("BEGIN EXCLUSIVE")
            yield
    except (OSError, sqlite3.OperationalError) as error:
        raise SetupError(
            f"Cannot write to {HOME} ({error}). Set LESSONS_HOME to a folder that can be written."
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


def start():
    """Prepare this kernel for a lesson, and return its practice API (`fake_github.FakeGitHub`).

    Can be run again: what is up is left as it is, what is down is started. Raises `SetupError`.
    """
    global _github
    api_url = os.environ["PREFECT_API_URL"] = f"{start_server()}/api"
    import prefect.context
    import prefect.main  # sets up Prefect's logging, which comes before ours
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.settings import get_current_settings

    from fake_github import FakeGitHub

    if get_current_settings().api.url != api_url:  # imported before this module, or it moved
        prefect.context.refresh_global_settings_context()
    # Each flow run would end with a wait of up to a second for the thread of its heartbeat, by
    # which Prefect Cloud knows that a run has crashed. No variable can say that there is none.
    get_current_settings().flows.heartbeat_frequency = None
    plain_logs()
    for port in PRACTICE_PORTS:
        if _github is None:
            with suppress(OSError):  # taken, perhaps by another kernel a moment ago
                _github = FakeGitHub(latency=0.1, rate_limit=5000, port=port).start()
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
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    os.environ.pop("GITHUB_API_URL", None)
    if _token:
        os.environ["GITHUB_TOKEN"] = _token
    with get_client(sync_client=True) as client, suppress(ObjectNotFound):
        client.delete_global_concurrency_limit_by_name("github-api")
    print("From here on: https://api.github.com", "with" if _token else "without", "a token")


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
    (handler,) = logging.getLogger().handlers
    handler.addFilter(nothing := lambda record: False)
    try:
        yield
    finally:
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
    from contextlib import suppress

    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        with suppress(ObjectNotFound):
            client.delete_global_concurrency_limit_by_name(name)
        client.create_global_concurrency_limit(
            GlobalConcurrencyLimitCreate(
                name=name, limit=limit, slot_decay_per_second=slot_decay_per_second
            )
        )


def clear_cache() -> None:
    """Forget all cached results, so that the next run has to ask the API."""
    shutil.rmtree(HOME / "storage", ignore_errors=True)


# --- Charts ---------------------------------------------------------------------------------------

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"  # told apart by colour-blind readers too


def show_code(*functions) -> None:
    """Print the source of tasks, flows or functions, without their docstrings."""
    import inspect

    sources = []
    for function in functions:
        function = getattr(function, "fn", function)
        source = textwrap.dedent(inspect.getsource(function))
        sources.append(re.sub(r'^ *""".*?"""\n', "", source, count=1, flags=re.S | re.M))
    print("\n\n".join(sources), end="")


def chart_requests(requests, title: str, repos: list[str] | None = None, floor=None) -> None:
    """Draw when each request was under way, a row for each repository, as the practice API saw it.

    requests: a `FakeGitHub.requests`, or several of them by name, drawn on one time scale
    repos: the rows from top to bottom, also for repositories that were never asked
    floor: where to draw the shortest possible time, in seconds; by name for several
    """
    import matplotlib.pyplot as plt

    logs = requests if isinstance(requests, dict) else {"": requests}
    floors = floor if isinstance(floor, dict) else dict.fromkeys(logs, floor)
    rows = [repos or log["repository"].drop_duplicates().tolist() for log in logs.values()]
    row = 0.3 if len(logs) < 3 else 0.22  # inches, so that all is seen at once
    heights = [0.6 + (row * len(names) if len(names) <= 12 else 3) for names in rows]
    longest = max((log["time"] + log["duration"]).max() for log in logs.values())
    figure, all_axes = plt.subplots(
        len(logs),
        sharex=True,
        squeeze=False,
        figsize=(8, 0.6 + sum(heights)),
        height_ratios=heights,
    )
    for axes, names, (name, log) in zip(all_axes[:, 0], rows, logs.items(), strict=True):
        y = log["repository"].map(names.index)
        end = log["time"] + log["duration"]
        failed = ~log["status"].between(200, 399)
        colors = failed.map({True: ORANGE, False: BLUE})
        axes.barh(y, log["duration"], left=log["time"], height=0.6, color=colors)
        following = log.groupby("repository")["time"].shift(-1)
        for bar in log.index[failed] if len(names) <= 12 else ():
            status = str(log["status"][bar] or "no answer")
            room = longest * (0.03 + 0.016 * len(status))
            label = {"va": "center", "fontsize": "small"}
            if log["duration"][bar] > room:
                middle = log["time"][bar] + log["duration"][bar] / 2
                axes.text(middle, y[bar], status, ha="center", color="white", **label)
            elif not following[bar] < end[bar] + room:  # of attempts close together, the last
                axes.text(end[bar], y[bar], f" {status}", color=ORANGE, **label)
        if floors.get(name):
            axes.axvline(floors[name], color="black", linestyle="--", linewidth=1)
            axes.text(floors[name], -0.6, " floor", va="bottom", fontsize="small")
        if len(names) <= 12:
            axes.set_yticks(range(len(names)), names)
        else:
            axes.set_yticks([])
            axes.set_ylabel(f"{len(names)} repositories")
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_title(name, loc="left", fontsize="medium", pad=16 if floors.get(name) else None)
    all_axes[-1, 0].set_xlabel("time (s)")
    all_axes[-1, 0].set_xlim(left=0)
    figure.suptitle(title, x=0.01, ha="left")
    counts = [f"{len(log)} requests {name}".strip() for name, log in logs.items()]
    show_chart(figure, f"{title}. Over time, a row for each repository: {', '.join(counts)}.")


def chart_allowance(
    requests, title: str, limit: int, slot_decay_per_second: float, api: tuple | None = None
) -> None:
    """Draw the requests so far against the most that a global concurrency limit lets through.

    That is `limit` at once, and `slot_decay_per_second` more a second. Refused requests (403, 429)
    are marked.

    api: what the API answers, as (requests, seconds), to draw its first window
    """
    import matplotlib.pyplot as plt

    log = requests.sort_values("time", ignore_index=True)
    count = log.index + 1
    last = log["time"].max()
    figure, axes = plt.subplots(figsize=(8, 3.5))
    axes.step(log["time"], count, where="post", color=BLUE, label="requests")
    axes.plot(
        [0, last],
        [limit, limit + slot_decay_per_second * last],
        color="black",
        linestyle="--",
        label=f"our limit: {limit} + {slot_decay_per_second:g} a second",
    )
    if api:
        answers, window = api
        label = f"the API: {answers} in {window} seconds"
        axes.hlines(answers, 0, window, color=GREY, linewidth=2, label=label)
    refused = log["status"].isin([403, 429])
    if refused.any():
        axes.plot(log["time"][refused], count[refused], "x", color=ORANGE, label="refused")
    axes.set(xlabel="time (s)", ylabel="requests so far", ylim=(0, None), xlim=(0, None))
    axes.yaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower left", ncols=4, fontsize="small")
    figure.suptitle(title, x=0.01, ha="left")
    text = f"{len(log)} requests over time, and the line that the limit does not let them cross"
    show_chart(figure, f"{title}. {text}; {refused.sum()} were refused.")


def show_chart(figure, alt: str) -> None:
    """Show a figure once, with a text for those who do not see it (in HTML made by nbconvert)."""
    import matplotlib.pyplot as plt
    from IPython.display import display

    display(figure, metadata={"image/png": {"alt": alt}})
    plt.close(figure)


def main() -> None:
    command = sys.argv[1] if len(sys.argv) == 2 else ""
    if command == "status":
        print(server_url() or "The Prefect server of the lessons is not running.")
    elif command in ("stop", "reset"):
        print("Stopped." if stop_server() else "It was not running.")
        if command == "reset":
            shutil.rmtree(HOME, ignore_errors=True)
            print(f"Removed {HOME}.")
    else:
        print(__doc__)


if __name__ == "__main__":
    main()
else:
    # Before anything else imports Prefect: nothing of the reader's own is used or changed.
    os.environ.update(isolated(KERNEL_SETTINGS))
    for name in set(os.environ) - set(isolated(KERNEL_SETTINGS)):
        del os.environ[name]
    # Dask's scheduler would tell of each connection, some time later, in whichever cell then runs.
    os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "error")
    for name in ("NO_PROXY", "no_proxy"):  # nor is a proxy asked for addresses of this machine
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1", "localhost"]))

"""A Prefect server with a fresh home for each worker of pytest-xdist, and one practice API.

Kernels that nbval starts inherit the environment, so a worker's notebooks use the worker's server.
"""

import atexit
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from functools import cache
from pathlib import Path

import certifi
import pytest
from xdist.scheduler import LoadScopeScheduling

LESSON = Path(__file__).with_name("notebooks") / "lesson.py"
TOGETHER = "test_script.py", "test_gauntlet.py"  # on one worker
LONGEST = "08_gauntlet.ipynb", "09_your_own_api.ipynb"


def pytest_configure(config):
    # From whatever folder the tests are run. An option would be a path from there.
    config.option.nbval_sanitize_with = str(config.rootpath / "tests" / "sanitize.cfg")
    # Whoever ends the run with a signal gets the servers ended with it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # A shell that runs the tests in the background has this one ignored, in what they start too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if worker := getattr(config, "workerinput", None):
        home = Path(os.environ["LESSONS_HOME"], worker["workerid"])
        home.mkdir()
    else:
        home = Path(tempfile.mkdtemp(prefix="lessons-"))
        atexit.register(clean_up, home)  # before Prefect is imported: after it sent its last logs
        # Prefect and httpx load all authorities for each client, a tenth of all that the tests
        # compute. None is asked: everything is at http://127.0.0.1.
        authority = re.search(r"-----BEGIN .*?-----END [^\n]+", certifi.contents(), re.S)[0]
        Path(home, "authority.pem").write_text(authority)
        os.environ["SSL_CERT_FILE"] = str(home / "authority.pem")
    # Before `lesson` is imported, which replaces all PREFECT_* too.
    os.environ["LESSONS_HOME"] = os.environ["PREFECT_HOME"] = str(home)  # nothing in ~/.prefect
    os.environ["IPYTHONDIR"] = str(home / "ipython")  # nor anything else of the user's own
    # GitHub's runners set the first two: never go live. The third would print without a buffer,
    # in which most readers' Python can lose something.
    for name in ("GITHUB_TOKEN", "GITHUB_API_URL", "PYTHONUNBUFFERED"):
        os.environ.pop(name, None)


def clean_up(home):
    """The workers are gone by now, in whatever way they ended."""
    for address in home.rglob("server.json"):
        environment = os.environ | {"LESSONS_HOME": str(address.parents[1])}
        subprocess.run([sys.executable, LESSON, "stop"], env=environment, stdout=subprocess.DEVNULL)
    shutil.rmtree(home, ignore_errors=True)


def needs_server(item):
    fixtures = getattr(item, "fixturenames", ["practice_api"])  # or it is a cell
    return "practice_api" in fixtures or "lab" in fixtures


def pytest_xdist_make_scheduler(config, log):
    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            # What has one scope stays together: it shares a kernel, or a process that is forked.
            file = Path(nodeid.partition("::")[0])
            return file.name if file.suffix == ".ipynb" or file.name in TOGETHER else nodeid

    return Scheduler(config, log)


def pytest_collection_modifyitems(items):
    """The longest lessons come first, or all wait for it at the end. Then what needs no Prefect
    server, while the first one starts; the long files; the other lessons; the other tests, for the
    same reason the slow ones first.
    """

    def turn(item):
        longest = item.path.name in LONGEST
        long = item.path.name in TOGETHER
        slow = bool(item.get_closest_marker("slow"))
        script = item.path.suffix == ".py"
        return not longest, long or needs_server(item), not long, script, not slow

    items.sort(key=turn)


def pytest_runtest_setup(item):
    if needs_server(item):
        start_server()  # else this process or a kernel might start one, on the usual port


@cache
def start_server():
    """The worker's Prefect server, on any free port: all would choose the same at the same moment.

    To make the database is most of a start: the first worker that comes makes one for all. Returns
    a copy of it, as new.
    """
    import background
    import lesson

    shared = Path(os.environ["LESSONS_HOME"])
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    new, own = shared / "new" / "prefect.db", lesson.HOME / "prefect.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(background, "PORTS", (0,))
        with lesson.only_one(new.parent):
            if not new.exists():
                lesson.start_server()
                with closing(sqlite3.connect(own)) as made, closing(sqlite3.connect(new)) as copy:
                    made.backup(copy)
        if not own.exists():
            own.parent.mkdir(exist_ok=True)
            shutil.copy(new, own)
        lesson.start_server()  # if it is not up
    return new


@pytest.fixture
def new_database(practice_api):
    return start_server()


@pytest.fixture(scope="session")
def practice_api():
    import lesson

    return lesson.start()


@pytest.fixture
def github(practice_api, monkeypatch):
    """The practice API as new, no cached results, a limit that does not bind, quick retries."""
    import lesson
    import pipeline

    monkeypatch.setattr(pipeline.resilient_fetch_stats, "retry_delay_seconds", [0.01])
    practice_api.reset()
    practice_api.latency = 0
    lesson.clear_cache()
    lesson.usual_limit()
    return practice_api

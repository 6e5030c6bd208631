"""One Prefect server with a fresh home for the whole run, and one practice API for the tests.

Kernels that nbval starts inherit the environment, so the notebooks use the same server.
"""

import atexit
import os
import shutil
import signal
import subprocess
import sys
import tempfile

import pytest

HOME = tempfile.mkdtemp(prefix="lessons-")
os.environ["LESSONS_HOME"] = HOME  # before `lesson` is imported, which replaces all PREFECT_* too
os.environ["IPYTHONDIR"] = os.path.join(HOME, "ipython")  # nor anything else of the user's own
for name in ("GITHUB_TOKEN", "GITHUB_API_URL"):  # GitHub's runners set them: never go live
    os.environ.pop(name, None)

import lesson  # noqa: E402

starting = None  # the process that starts the Prefect server


@atexit.register  # before Prefect is imported: runs after Prefect sent off its last logs
def _clean_up():
    if starting:
        starting.terminate()
        starting.wait()
    lesson.stop_server()
    shutil.rmtree(HOME, ignore_errors=True)


def pytest_configure(config):
    # Whoever ends the run with a signal gets the server ended with it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_collection_modifyitems(config, items):
    """What needs no Prefect server comes first, while the server starts."""

    def needs_server(item):
        fixtures = getattr(item, "fixturenames", ["practice_api"])  # or it is a cell
        return "practice_api" in fixtures or "lab" in fixtures

    global starting
    items.sort(key=needs_server)
    if items and needs_server(items[-1]) and not config.option.collectonly:
        command = [sys.executable, "-c", "import lesson; lesson.start_server()"]
        folder = os.path.dirname(lesson.__file__)
        starting = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="session")
def practice_api():
    return lesson.start()


@pytest.fixture
def github(practice_api):
    """The practice API as new, no cached results, and a `github-api` limit that does not bind."""
    practice_api.reset()
    practice_api.latency = 0
    lesson.clear_cache()
    lesson.new_limit("github-api", 5000, 5000 / 3600)
    return practice_api

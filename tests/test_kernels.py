"""Kernels that are interrupted and restarted, and what is left when a process ends: nothing."""

import contextlib
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
from jupyter_client.manager import start_new_kernel
from test_lesson import end_servers_in, servers_in, stand_in, until
from test_script import cached

import background
import lesson

ROOT = Path(__file__).parents[1]

# --- Kernels --------------------------------------------------------------------------------------


SET_UP = "import lesson\n\ngithub = lesson.start()"
REPOSITORIES = "from pipeline import show_stars\nrepos = [f'load-test/{n}' for n in range(24)]\n"
OTHERS = "from pipeline import show_stars\nrepos = [f'load-test/{n}' for n in range(24, 48)]\n"


class Kernel:
    def __init__(self, stack, **environment):
        self.manager, self.client = start_new_kernel(
            cwd=ROOT / "notebooks", env=os.environ | environment
        )
        stack.callback(self.manager.shutdown_kernel, now=True)
        stack.callback(self.client.stop_channels)
        port = background.free_port((0,))  # nobody else's, so that it is the same after a restart
        self.set_up = f"import lesson\nlesson.PRACTICE_PORTS = ({port}, 0)\n{SET_UP}"

    def begin(self, code):
        self.cell, self.said = self.client.execute(code), ""

    def hear(self, message):
        """Read what the cell says until it contains the message."""
        while message not in self.said:
            heard = self.client.get_iopub_msg(timeout=60)
            if heard["parent_header"].get("msg_id") == self.cell:
                content = heard["content"]
                self.said += content.get("text", "") + content.get("execution_state", "")

    def end(self):
        """The reply to the cell, at its end."""
        while True:
            reply = self.client.get_shell_msg(timeout=60)
            if reply["parent_header"].get("msg_id") == self.cell:
                self.hear("idle")
                return reply["content"]

    def run(self, code):
        """Run a cell, and return what it printed."""
        self.begin(code)
        reply = self.end()
        assert reply["status"] == "ok", reply
        return self.said.removeprefix("busy").removesuffix("idle")

    def interrupt(self):
        self.manager.interrupt_kernel()
        assert self.end()["ename"] == "KeyboardInterrupt"

    def restart(self):
        self.manager.restart_kernel(now=True)
        self.client.wait_for_ready(timeout=60)


LEFT = "Limit github-api   5 slots, 0.001 a second. Not in use? lesson.usual_limit() restores it.\n"


def kept(*storages):
    """The repositories of which there are results in these folders."""
    names = set()
    for storage in storages:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lesson, "STORAGE", Path(storage))
            names |= set(cached())
    return names


@pytest.mark.slow
def test_the_life_of_two_kernels(github):
    (server,) = servers_in(lesson.HOME)
    with contextlib.ExitStack() as stack:
        # One knows its notebook, as in JupyterLab, and one does not.
        one, two = kernels = Kernel(stack), Kernel(stack, JPY_SESSION_NAME="/two.ipynb")
        for kernel in kernels:
            kernel.begin(kernel.set_up)
        assert [kernel.end()["status"] for kernel in kernels] == ["ok", "ok"]
        for kernel in kernels:
            assert f"Prefect dashboard  {lesson.server_url()}\n" in kernel.said
            assert "Starting" not in kernel.said
        storages = [kernel.run("print(lesson.STORAGE, end='')") for kernel in kernels]

        # The set-up cell once more: nothing changes.
        before = one.run(
            "print('Prefect dashboard ', lesson.server_url())\n"
            "print('Practice API      ', github.url)\nbefore = github"
        )
        assert one.run(f"{SET_UP}\nassert github is before") == before

        # Interrupted while a worker waits for GitHub, and while workers wait for a slot.
        one.run(f"{REPOSITORIES}github.fail(repos[0], status=429, headers={{'retry-after': 110}})")
        one.begin("show_stars(repos[:8])")
        one.hear("it asks to wait")
        one.interrupt()
        have = len(kept(*storages))
        one.run("lesson.new_limit('github-api', 5, 1e-3)")
        for kernel, repos in ((one, REPOSITORIES), (two, OTHERS)):
            kernel.begin(f"{repos}show_stars(repos)")
        for kernel in kernels:
            kernel.hear("wait for slots of github-api")
        until(lambda: len(kept(*storages)) == have + 5)
        for kernel in kernels:
            kernel.interrupt()
        assert one.run("print(1 + 1)") == "2\n"
        assert servers_in(lesson.HOME) == [server]

        # Restarted: the server and the limit are the same, and what was fetched is cached, also if
        # another notebook forgets its own.
        one.restart()
        assert one.run(one.set_up) == before + LEFT
        assert two.run(f"lesson.clear_cache()\n{SET_UP}").endswith(LEFT)
        have = len(kept(storages[0]))
        assert have > 0
        assert kept(storages[1]) == set()
        one.run(f"lesson.usual_limit()\n{REPOSITORIES}assert list(show_stars(repos)) == repos")
        assert one.run("print(len(github.requests))") == f"{24 - have}\n"
        assert servers_in(lesson.HOME) == [server]


def test_a_server_outlives_the_kernel_that_started_it(tmp_path):
    home = tmp_path / ".lessons"
    with contextlib.ExitStack() as stack:
        kernel = Kernel(stack, LESSONS_HOME=str(tmp_path))
        stack.callback(end_servers_in, home)
        kernel.run(
            "import os, time\nimport background, lesson\nbackground.PORTS = (0,)\n"
            f"os.environ['PYTHONPATH'] = {stand_in(tmp_path)!r}\nurl = lesson.start_server()"
        )
        (server,) = servers_in(home)
        kernel.begin("print('waiting')\ntime.sleep(600)")
        kernel.hear("waiting")
        kernel.interrupt()
        assert kernel.run("print(lesson.start_server() == url)") == "True\n"
        kernel.restart()
        assert servers_in(home) == [server]


# --- Nothing is left behind -----------------------------------------------------------------------

A_TEST = """\
    import os, signal, sys, time
    from pathlib import Path
    import lesson
    import background

    background.PORTS = (0,)

    def end(signal):
        os.kill(os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid(), signal)
        time.sleep(60)

    def test_it(monkeypatch):
        with monkeypatch.context() as patch:
            patch.setenv("PYTHONPATH", {stand_in!r})
            Path(__file__).with_name("url").write_text(lesson.start_server())
        {end}
"""
PYTEST = """\
import signal, sys
import pytest
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
sys.exit(pytest.main())
"""


def processes_with(folder):
    """The processes whose temporary folder it is."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("TMPDIR") == str(folder):
                found.append(process)
    return found


@pytest.mark.skipif(sys.platform == "win32", reason="no signals, no TMPDIR")
@pytest.mark.parametrize(
    ("workers", "end", "code"),
    [
        (0, "end(signal.SIGINT)", pytest.ExitCode.INTERRUPTED),
        (1, "assert False", pytest.ExitCode.TESTS_FAILED),
        (2, "end(signal.SIGTERM)", pytest.ExitCode.INTERRUPTED),
    ],
)
def test_no_process_is_left_when_the_tests_end(tmp_path, workers, end, code):
    shutil.copy(ROOT / "conftest.py", tmp_path)
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    test = textwrap.dedent(A_TEST).format(stand_in=stand_in(tmp_path), end=end)
    (tmp_path / "test_it.py").write_text(test, encoding="utf-8")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = os.environ | {
        "TMPDIR": str(temporary),
        "PYTHONPATH": str(ROOT / "notebooks"),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_PLUGINS": "xdist",
        "PYTEST_ADDOPTS": f"-n {workers} -p no:cacheprovider",
    }
    for name in [name for name in environment if name.startswith("PYTEST_XDIST")]:
        del environment[name]
    done = subprocess.run(
        [sys.executable, "-c", PYTEST],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    left = processes_with(temporary)
    for process in left:
        process.kill()
    assert done.returncode == code, done.stdout + done.stderr
    assert (tmp_path / "url").read_text().startswith("http://127.0.0.1:")
    assert left == []
    names = [path.name for path in temporary.iterdir()]
    # With workers pytest keeps a folder of its own.
    assert [name for name in names if not (workers and name.startswith("pytest-of-"))] == []

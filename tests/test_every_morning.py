"""What runs every morning: its history, its alarms, its late runs (lesson 7 and operating.md)."""

import importlib.util
import logging
import re
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import nbformat
import pytest
from prefect import flow
from prefect.automations import Automation
from prefect.client.orchestration import get_client
from prefect.states import Failed, Scheduled

import gauntlet
import lesson
from pipeline import REPOS, show_stars

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
NAME = "every-morning/every-morning"


def python_of_operating(word):
    """The Python of operating.md that has this word in it."""
    text = (NOTEBOOKS / "operating.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.+?)^```$", text, re.M | re.S)
    (block,) = (block for block in blocks if word in block)
    return block


@pytest.fixture
def script(github, tmp_path, monkeypatch):
    """The script of operating.md as a module, in a folder of its own."""
    path = tmp_path / "every_morning.py"
    path.write_text(python_of_operating(".serve("))
    spec = importlib.util.spec_from_file_location("every_morning", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "every_morning", module)
    spec.loader.exec_module(module)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[1]}")
    monkeypatch.setenv("WEBHOOK_URL", "")
    yield module
    lesson.delete_deployment(NAME)


def solution_of_the_lesson(old="", new=""):
    """The flow of the exercise, with a change, and the file of its history."""
    cells = nbformat.read(NOTEBOOKS / "07_scaling_out.ipynb", as_version=4).cells
    sources = [cell.source for cell in cells if cell.cell_type == "code"]
    (text,) = (cell.source for cell in cells if "<summary>Solution" in cell.source)
    (solution,) = re.findall(r"^```python\n(.+?)^```$", text, re.M | re.S)
    assert old in solution
    space = {"lesson": lesson, "flow": flow, "show_stars": show_stars}
    for word in "history =", "def tell":
        exec(next(source for source in sources if word in source), space)
    exec(solution.replace(old, new), space)
    return space["every_morning"], space["history"]


def judged(github, monkeypatch, morning, history):
    """The verdict, and the lines that do not hold."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.NullHandler()])  # no pytest's
    *lines, verdict = repr(gauntlet.mornings(github, morning, history)).splitlines()
    assert len(lines) == 6
    return verdict, [line.split("| ")[1].split(":")[0] for line in lines if "does not" in line]


@pytest.mark.slow
def test_the_script_keeps_a_failed_morning_tells_of_it_and_can_be_repeated(
    github, monkeypatch, script
):
    told = judged(github, monkeypatch, script.every_morning, script.HISTORY)
    assert told == ("Solved.", [])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "fails"),
    [
        ("", "", []),
        (' if f"{day},{repo}," not in known', " if True", ["a second run", "a third run"]),
        ('f"{day},{repo},"', 'f",{repo},"', ["the next day adds"]),
        ("        raise failure", "        pass", ["that run fails"]),
        ("error.stars, error", "{}, error", ["a 404 loses only"]),
        ("on_failure=[tell], ", "", ["the message names"]),
    ],
)
def test_each_part_of_the_solution_keeps_its_promise(github, monkeypatch, old, new, fails):
    flow_and_file = solution_of_the_lesson(old, new)
    verdict, lines = judged(github, monkeypatch, *flow_and_file)
    assert verdict == ("Not yet." if fails else "Solved.")
    assert len(lines) == len(fails)
    assert all(line.startswith(start) for line, start in zip(lines, fails, strict=True))


def test_a_dead_webhook_changes_no_state_and_is_logged(script, github, monkeypatch, caplog):
    monkeypatch.setenv("WEBHOOK_URL", "http://127.0.0.1:1")  # no server
    github.fail(REPOS[0], status=404)
    with caplog.at_level("ERROR"):
        state = script.every_morning(REPOS, return_state=True)
    assert state.is_failed()
    assert f"1 of {len(REPOS)} repositories failed" in state.message
    assert "An error was encountered while running hook 'tell'" in caplog.text
    assert len(script.HISTORY.read_text().splitlines()) == len(REPOS) - 1


@pytest.mark.slow
def test_after_three_days_of_downtime_three_runs_add_today_once(script, github):
    serve = python_of_operating(".serve(").partition('if __name__ == "__main__":')[2]
    serve = f"from every_morning import *\nif __name__ == '__main__':{serve}"
    lesson.serve_and_run(serve, NAME)
    assert len(github.requests) == len(REPOS)
    script.HISTORY.unlink()
    lesson.clear_cache()
    github.reset()
    with get_client(sync_client=True) as prefect:
        deployment = prefect.read_deployment_by_name(NAME)
        missed = [
            prefect.create_flow_run_from_deployment(
                deployment.id,
                state=Scheduled(scheduled_time=datetime.now(UTC) - timedelta(days=days)),
            )
            for days in (3, 2, 1)
        ]
        lesson.serve_and_run(serve, NAME)  # its own run comes after those that are late
        runs = [prefect.read_flow_run(run.id) for run in missed]
    assert [run.state.name for run in runs] == ["Completed"] * 3
    assert runs[0].end_time <= runs[1].start_time
    assert runs[1].end_time <= runs[2].start_time
    assert len(github.requests) == len(REPOS)
    rows = [line.split(",")[:2] for line in script.HISTORY.read_text().splitlines()]
    assert [repo for _, repo in rows] == REPOS
    assert len({day for day, _ in rows}) == 1


@pytest.mark.slow
def test_an_automation_tells_of_a_failure_where_no_event_is_stored(script, monkeypatch):
    url, heard = lesson.webhook()
    monkeypatch.setenv("WEBHOOK_URL", url)
    exec(python_of_operating("Automation("), {})
    try:
        with get_client(sync_client=True) as prefect:
            services = prefect.request("GET", "/admin/settings").json()["server"]["services"]
            assert not services["event_persister"]["enabled"]
            deployment = script.every_morning.to_deployment("every-morning").apply()
            show_stars([], return_state=True)  # fails, and is no run of the deployment
            run = prefect.create_flow_run_from_deployment(
                deployment, parameters={"github_repos": []}
            )
            prefect.set_flow_run_state(run.id, Failed(), force=True)
        deadline = time.monotonic() + 60
        while not heard and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        Automation.read(name="every-morning").delete()
    assert heard == [f"every-morning {run.name}: Failed"]

"""Take the pictures of Prefect's dashboard that the lessons show.

    python tests/pictures.py                 all of them, in about a minute
    python tests/pictures.py cached tour     some of them

Runs what the lessons run, on a Prefect server with a new home, and lets Chromium photograph the
server's pages: `notebooks/pictures/dashboard-NAME.png`. Names of runs and times are new each time,
so look at the pictures before you commit them.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout, suppress
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
os.environ["LESSONS_HOME"] = tempfile.mkdtemp(prefix="pictures-")
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]

import lesson  # noqa: E402  (it reads LESSONS_HOME)

github = lesson.start()

import nbformat  # noqa: E402  (Prefect and what imports it come after `start`)
from nbclient import NotebookClient  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402
from prefect import flow, get_client  # noqa: E402
from prefect.client.schemas.filters import FlowRunFilter  # noqa: E402
from prefect.client.schemas.sorting import FlowRunSort  # noqa: E402
from prefect.exceptions import ObjectNotFound  # noqa: E402

from pipeline import fetch_stats, show_stars  # noqa: E402

URL = lesson.server_url()
BROWSERS = "chromium", "chromium-browser", "google-chrome", "chrome"
SIZE = {"width": 800, "height": 1200}  # about as wide as a notebook's text
DRAWN = 4000  # milliseconds, until a graph is drawn: no event tells of that


@cache
def runs_of(notebook: str) -> list:
    """Execute a lesson, as it is stored, and return its flow runs in their order."""
    before = {run.id for run in prefect.read_flow_runs()}
    lesson_file = nbformat.read(ROOT / "notebooks" / notebook, as_version=4)
    resources = {"metadata": {"path": str(ROOT / "notebooks")}}
    NotebookClient(
        lesson_file, timeout=180, resources=resources, skip_cells_with_tag="nbval-skip"
    ).execute()
    runs = prefect.read_flow_runs(sort=FlowRunSort.START_TIME_ASC)
    return [run for run in runs if run.id not in before]


# --- A function for each picture: it opens a page, and returns from where to where it is seen -----


def graph(page, run):
    page.goto(f"{URL}/runs/flow-run/{run.id}")
    page.wait_for_timeout(DRAWN)
    return ".page-heading", ".flow-run-graphs"


def first_run(page):
    """Lesson 1: three repositories, one after another."""
    return graph(page, runs_of("01_first_flow.ipynb")[0])


def failed_run(page):
    """Lesson 1: the second of the three answers 503."""
    failed = [run for run in runs_of("01_first_flow.ipynb") if run.state.name == "Failed"]
    return graph(page, failed[0])


def not_found(page):
    """Lesson 3: one of eight repositories is misspelt; the page of its task run."""

    @flow
    def mapped(github_repos):
        fetch_stats.map(github_repos).wait()

    repos = github.repositories["full_name"].head(8).tolist()
    misspelt = [*repos[:2], "django/djagno", *repos[3:]]
    with lesson.quiet():
        state = mapped(misspelt, return_state=True)
    lesson.task_states(state, count=8)
    flow_run = FlowRunFilter(id={"any_": [state.state_details.flow_run_id]})
    runs = prefect.read_task_runs(flow_run_filter=flow_run)
    [run] = [run for run in runs if run.state.name == "Failed"]
    page.goto(f"{URL}/runs/task-run/{run.id}")
    page.wait_for_timeout(DRAWN)
    return ".page-heading", "text=Traceback", 10  # below it are paths of this machine


def cached(page):
    """Lesson 6: 24 repositories for the second time."""
    repos = github.repositories["full_name"].tolist()
    with lesson.quiet(), redirect_stdout(None):
        show_stars(repos, return_state=True)
        state = show_stars(repos, return_state=True)
    lesson.task_states(state, count=48)
    page.goto(f"{URL}/runs/flow-run/{state.state_details.flow_run_id}")
    page.get_by_text("Task Runs", exact=True).click()
    page.get_by_placeholder("Search by run name").fill("fetch_stats")
    page.wait_for_timeout(DRAWN)
    return ".p-tab-navigation", ".task-run-list", 5 * 84  # a task run is 84 pixels high


def deployment(page):
    """Lesson 7: the finished flow, each morning at six."""
    script = """
from pipeline import REPOS, show_stars
show_stars.serve("every-morning", cron="0 6 * * *", parameters={"github_repos": REPOS})
"""
    nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    serving = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, **nowhere)
    try:
        while True:
            with suppress(ObjectNotFound):
                made = prefect.read_deployment_by_name("show-stars/every-morning")
                if made.status == "READY":
                    break
        page.goto(f"{URL}/deployments/deployment/{made.id}")
        page.wait_for_timeout(DRAWN)
    finally:
        serving.terminate()
        serving.wait()
    return ".page-heading", "text=Ready"


PICTURES = first_run, failed_run, not_found, cached, deployment


# --- The camera -----------------------------------------------------------------------------------


def photograph(page, picture) -> None:
    """Save the page from its one part to its other, of which perhaps only the first pixels."""
    first, last, *height = picture(page)
    first, last = (page.locator(part).first.bounding_box() for part in (first, last))
    top, bottom = first["y"] - 16, last["y"] + (height or [last["height"]])[0] + 8
    name = f"dashboard-{picture.__name__.replace('_', '-')}.png"
    file = ROOT / "notebooks" / "pictures" / name
    clip = {"x": 0, "y": top, "width": SIZE["width"], "height": bottom - top}
    page.screenshot(path=file, clip=clip)
    print(f"{file.relative_to(ROOT)}: {file.stat().st_size / 1000:.0f} kB")


def main(names: list[str]) -> None:
    global prefect
    with get_client(sync_client=True) as prefect, sync_playwright() as driver:
        executable = next(filter(None, map(shutil.which, BROWSERS)))
        root = hasattr(os, "geteuid") and os.geteuid() == 0  # for which Chromium has no sandbox
        args = ["--no-sandbox"] if root else []
        browser = driver.chromium.launch(executable_path=executable, args=args)
        for picture in PICTURES:
            if not names or picture.__name__.replace("_", "-") in names:
                page = browser.new_page(viewport=SIZE, device_scale_factor=1.5)
                page.add_init_script("""localStorage.setItem("color-scheme", '"light"')""")
                photograph(page, picture)
                page.close()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    finally:
        lesson.stop_server()
        shutil.rmtree(os.environ["LESSONS_HOME"])

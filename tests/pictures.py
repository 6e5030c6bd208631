"""Take the pictures of Prefect's dashboard that the lessons show.

    python tests/pictures.py                 all of them, in a minute or two
    python tests/pictures.py cached tour     some of them

Runs what the lessons run, on a Prefect server with a new home, and lets Chromium photograph the
server's pages: `notebooks/pictures/dashboard-NAME.png`. Names of runs and times are new each time,
so look at the pictures before you commit them.
"""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout, suppress
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOME = os.environ["LESSONS_HOME"] = tempfile.mkdtemp(prefix="pictures-")
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]

import lesson  # noqa: E402  (it reads LESSONS_HOME)

atexit.register(shutil.rmtree, HOME, ignore_errors=True)
atexit.register(lesson.stop_server)
github = lesson.start()

import nbformat  # noqa: E402  (what imports Prefect comes after `start`)
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
DRAWN = 8000  # milliseconds, until a graph is drawn: no event tells of that


@cache
def runs_of(notebook: str, prefect) -> list:
    """Execute a lesson, as it is stored, and return its flow runs in their order."""
    before = {run.id for run in prefect.read_flow_runs()}
    stored = nbformat.read(ROOT / "notebooks" / notebook, as_version=4)
    options = {"timeout": 180, "skip_cells_with_tag": "nbval-skip"}
    resources = {"metadata": {"path": str(ROOT / "notebooks")}}
    NotebookClient(stored, kernel_name="python3", resources=resources, **options).execute()
    runs = prefect.read_flow_runs(sort=FlowRunSort.START_TIME_ASC)
    return [run for run in runs if run.id not in before]


def open_run(page, flow_run_id) -> None:
    page.goto(f"{URL}/runs/flow-run/{flow_run_id}")
    page.wait_for_timeout(DRAWN)


# --- A function for each picture: it opens a page, and returns from where to where it is seen -----
# (nothing: all of it)


def tour(page, prefect):
    """The tour: the run that fetches what the star chart shows."""
    runs = runs_of("00_quick_tour.ipynb", prefect)
    mapped = [run for run in runs if prefect.read_flow(run.flow_id).name == "all-at-once"]
    page.set_viewport_size({"width": 780, "height": 840})
    open_run(page, mapped[-1].id)
    options = page.get_by_label("Run Graph Options")
    options.click()
    narrower = page.locator("xpath=//*[contains(text(), 'Scaling')]/following::button[1]")
    for _ in range(2):  # shorter bars, so that there is room for larger letters
        narrower.click()
    options.click()
    page.get_by_title("Toggle fullscreen").click()
    page.get_by_title("Recenter graph").click()
    page.mouse.move(0, 0)
    page.wait_for_timeout(DRAWN)


def first_run(page, prefect):
    """Lesson 1: three repositories, one after another; the graph and the first lines of the log."""
    open_run(page, runs_of("01_first_flow.ipynb", prefect)[0].id)
    return ".page-heading", ".p-tab-navigation", 300


def failed_run(page, prefect):
    """Lesson 1: the second of three names is misspelt."""
    runs = runs_of("01_first_flow.ipynb", prefect)
    open_run(page, next(run.id for run in runs if run.state.name == "Failed"))
    return ".page-heading", ".flow-run-graphs"


def not_found(page, prefect):
    """Lesson 3: one of eight repositories is misspelt; the page of its task run."""

    @flow
    def mapped(github_repos):
        fetch_stats.map(github_repos).wait()

    repos = github.repositories["full_name"].head(8).tolist()
    with lesson.quiet():
        state = mapped([*repos[:2], "django/djagno", *repos[3:]], return_state=True)
    lesson.task_states(state, count=8)
    flow_run = FlowRunFilter(id={"any_": [state.state_details.flow_run_id]})
    runs = prefect.read_task_runs(flow_run_filter=flow_run)
    [failed] = [run for run in runs if run.state.name == "Failed"]
    page.goto(f"{URL}/runs/task-run/{failed.id}")
    page.wait_for_timeout(DRAWN)
    return ".page-heading", "text=Traceback", 10  # below it are paths of this machine


def cached(page, prefect):
    """Lesson 6: 24 repositories for the second time."""
    repos = github.repositories["full_name"].tolist()
    with lesson.quiet(), redirect_stdout(None):
        show_stars(repos)
        state = show_stars(repos, return_state=True)
    lesson.task_states(state, count=48)
    open_run(page, state.state_details.flow_run_id)
    page.get_by_text("Task Runs", exact=True).click()
    page.get_by_placeholder("Search by run name").fill("fetch_stats")
    page.wait_for_timeout(DRAWN)
    return ".p-tab-navigation", ".task-run-list", 5 * 84  # a task run is 84 pixels high


def deployment(page, prefect):
    """Lesson 7: the finished flow, each morning at six."""
    script = """
from pipeline import REPOS, show_stars
show_stars.serve("every-morning", cron="0 6 * * *", parameters={"github_repos": REPOS})
"""
    nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    serving = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, **nowhere)
    try:
        made = None
        while not (made and made.status == "READY"):
            page.wait_for_timeout(500)
            with suppress(ObjectNotFound):
                made = prefect.read_deployment_by_name("show-stars/every-morning")
        page.goto(f"{URL}/deployments/deployment/{made.id}")
        page.wait_for_timeout(DRAWN)
    finally:
        serving.terminate()
        serving.wait()
    return ".page-heading", "text=Ready"


PICTURES = tour, first_run, failed_run, not_found, cached, deployment


# --- The camera -----------------------------------------------------------------------------------


def photograph(page, prefect, picture) -> None:
    """Save the page from its one part to its other, of which perhaps only the first pixels."""
    clip = None
    if parts := picture(page, prefect):
        first, last, *height = parts
        first, last = (page.locator(part).first.bounding_box() for part in (first, last))
        top, bottom = first["y"] - 16, last["y"] + (height or [last["height"]])[0] + 8
        clip = {"x": 0, "y": top, "width": page.viewport_size["width"], "height": bottom - top}
    name = f"dashboard-{picture.__name__.replace('_', '-')}.png"
    file = ROOT / "notebooks" / "pictures" / name
    page.screenshot(path=file, clip=clip)
    print(f"{file.relative_to(ROOT)}: {file.stat().st_size / 1000:.0f} kB")


def main(names: list[str]) -> None:
    executable = next(filter(None, map(shutil.which, BROWSERS)))
    root = hasattr(os, "geteuid") and os.geteuid() == 0  # for which Chromium has no sandbox
    args = ["--no-sandbox"] if root else []
    with get_client(sync_client=True) as prefect, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=args)
        for picture in PICTURES:
            if not names or picture.__name__.replace("_", "-") in names:
                page = browser.new_page(viewport=SIZE, device_scale_factor=1.5)
                page.add_init_script("""localStorage.setItem("color-scheme", '"light"')""")
                photograph(page, prefect, picture)
                page.close()


if __name__ == "__main__":
    main(sys.argv[1:])

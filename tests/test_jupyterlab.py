"""Every lesson in JupyterLab itself, in a browser without a window, the way a reader runs it."""

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx
import nbformat
import psutil
import pytest
from nbval.plugin import get_sanitize_patterns

import lesson
from background import free_port

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")

ROOT = Path(__file__).parents[1]
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CACHING = [path for path in PATHS if path.stem == "05_caching"]
BROWSERS = (
    *("chromium", "chromium-browser", "google-chrome", "chrome"),
    r"C:\Program Files\Google\Chrome\Application\chrome.exe",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)
SCREEN = {"width": 1280, "height": 900}
PATIENCE = 900_000  # milliseconds that a lesson may take on a slow machine
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false"},  # no question, no request
    # All cells take their room at once, so that they can be measured without scrolling.
    "notebook-extension/tracker": {"windowingMode": "none"},
}

executable = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.timeout(PATIENCE / 1000 + 100),
    pytest.mark.skipif(not executable, reason=f"no browser, none of {BROWSERS}"),
]

# What a reader sees of each code cell.
LOOK = """cells => cells.map(cell => {
    const all = selector => [...cell.querySelectorAll(selector)];
    const type = name => `[data-mime-type="application/vnd.jupyter.${name}"]`;
    return {
        count: cell.querySelector(".jp-InputPrompt").textContent,
        printed: all(type("stdout")).map(output => output.textContent),
        warnings: all(type("stderr")).map(output => output.textContent),
        errors: all(type("error")).map(output => output.textContent),
        images: all("img").map(image => image.complete && image.naturalWidth),
        cut_off: all(".jp-OutputArea-output, .jp-OutputArea-output *, .cm-scroller")
            .filter(part => part.clientWidth && part.scrollWidth > part.clientWidth)
            .map(part => part.textContent.slice(0, 200)),
        height: cell.querySelector(".jp-OutputArea")?.offsetHeight ?? 0,
    };
})"""


def log_of(folder):
    return (folder / "log").read_text(encoding="utf-8", errors="replace")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on a copy of the lessons, with nothing of the user's own; its address."""
    folder = tmp_path_factory.mktemp("jupyterlab")
    root = folder / "root"
    ignored = shutil.ignore_patterns(".*", "__pycache__")
    shutil.copytree(ROOT / "notebooks", root / "notebooks", ignore=ignored)
    shutil.copy(ROOT / "pipeline.py", root)
    for path in PATHS:  # an output that is there later was made later
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, root / "notebooks" / path.name)
    for name, settings in SETTINGS.items():
        file = folder / f"config/lab/user-settings/@jupyterlab/{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(settings), encoding="utf-8")
    url, token = f"http://127.0.0.1:{free_port((0,))}", secrets.token_hex()
    own = {f"JUPYTER_{n.upper()}_DIR": str(folder / n) for n in ("config", "data", "runtime")}
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root"]
    command += [f"--port={httpx.URL(url).port}", "--ServerApp.port_retries=0"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            command,
            cwd=root,
            env=os.environ | own | {"JUPYTER_TOKEN": token},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        lesson.start_server()
        deadline = time.monotonic() + 120
        while True:
            assert server.poll() is None, log_of(folder)
            try:
                httpx.get(f"{url}/api", trust_env=False)
                break
            except httpx.TransportError:
                assert time.monotonic() < deadline, log_of(folder)
                time.sleep(0.1)
        yield f"{url}/lab/tree/notebooks/{{}}?reset&token={token}"
    finally:
        family = [server, *psutil.Process(server.pid).children(recursive=True)]
        server.terminate()
        for process in psutil.wait_procs(family, timeout=20)[1]:
            process.kill()


@pytest.fixture(scope="module")
def browser():
    root = hasattr(os, "geteuid") and os.geteuid() == 0  # for which Chromium has no sandbox
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=executable, args=["--no-sandbox"] if root else []
        )
        yield browser


@pytest.fixture
def opened(request, lab, browser):
    """A lesson without outputs in a page of its own, its kernel ready; its stored code cells."""
    page = browser.new_page(viewport=SCREEN)
    page.set_default_timeout(PATIENCE)
    page.goto(lab.format(request.param.name))
    idle(page)  # before that, the menus are not complete
    stored = nbformat.read(request.param, as_version=4).cells
    unfold(page, stored)
    yield page, [cell for cell in stored if cell.cell_type == "code"]
    with page.expect_response(lambda response: response.request.method == "DELETE"):
        choose(page, "Kernel", "Shut Down Kernel")
    page.close()


def choose(page, menu, item):
    for _ in range(20):  # JupyterLab closes an open menu when it adds to it, while it loads
        page.keyboard.press("Escape")
        page.locator(".lm-MenuBar-item").get_by_text(menu, exact=True).click()
        with suppress(playwright.TimeoutError):
            page.get_by_role("menuitem", name=item, exact=True).click(timeout=5_000)
            return
    raise AssertionError(f"no {item} in the menu {menu}")


def unfold(page, stored):
    """Open *Going deeper*, which is folded when a lesson is opened."""
    folded = [cell.source.startswith("## Going deeper") for cell in stored]
    if any(folded):
        deeper = [cell for cell in stored[folded.index(True) :] if cell.cell_type == "code"]
        hidden = page.locator(".jp-CodeCell").locator("visible=false")
        playwright.expect(hidden).to_have_count(len(deeper), timeout=PATIENCE)
        page.locator(".jp-showHiddenCellsButton").click()
        playwright.expect(hidden).to_have_count(0)


def idle(page):
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()


def see(page, cells):
    """What there is to see of the code cells, once all of `cells` were executed."""
    page.wait_for_function(
        """cells => cells.every(cell => /\\d/.test(
            document.querySelectorAll(".jp-CodeCell .jp-InputPrompt")[cell].textContent))""",
        arg=cells,
    )
    idle(page)
    page.wait_for_function("() => [...document.images].every(image => image.complete)")
    return page.locator(".jp-CodeCell").evaluate_all(LOOK)


def sanitized(text):
    rules = (ROOT / "tests" / "sanitize.cfg").read_text(encoding="utf-8")
    for regex, replace in get_sanitize_patterns(rules):
        text = re.sub(regex, replace, text)
    return text.strip()


def check(seen, stored):
    """Compare what there is to see with the stored cells."""
    assert len(seen) == len(stored)
    for cell, told in zip(seen, stored, strict=True):
        tags, source = told.metadata.get("tags", []), told.source
        assert not cell["errors"] or "raises-exception" in tags, (source, cell["errors"])
        assert not cell["warnings"], (source, cell["warnings"])
        assert not cell["cut_off"], (source, cell["cut_off"])
        assert cell["height"] <= SCREEN["height"], (source, cell["height"])
        outputs = told.outputs
        prints = any(o.get("name") == "stdout" for o in outputs)
        assert len(cell["printed"]) <= prints, source
        charts = sum("image/png" in o.get("data", {}) for o in outputs)
        assert len(cell["images"]) == charts, source
        assert all(width > 400 for width in cell["images"]), (source, cell["images"])
        if not tags:
            printed = "".join(o.text for o in outputs if o.get("name") == "stdout")
            assert sanitized("".join(cell["printed"])) == sanitized(printed), source


def executed(stored):
    return [n for n, cell in enumerate(stored) if cell.execution_count]


def lessons(paths):
    return pytest.mark.parametrize("opened", paths, indirect=True, ids=lambda path: path.stem)


@lessons(CACHING)
def test_caching_is_right_also_again_and_after_a_restart(opened):
    page, stored = opened
    twice = "cached = requests_of_a_run(), requests_of_a_run()"
    (again,) = (n for n, cell in enumerate(stored) if twice in cell.source)
    choose(page, "Run", "Run All Cells")
    check(see(page, executed(stored)), stored)

    for _ in range(2):  # the cell empties the cache, and then runs the flow three times
        prompt = page.locator(".jp-CodeCell .jp-InputPrompt").nth(again)
        before = see(page, [again])[again]["count"]
        prompt.click()
        page.keyboard.press("Shift+Enter")
        playwright.expect(prompt).not_to_have_text(before, timeout=PATIENCE)
        printed = "".join(see(page, [again])[again]["printed"])
        assert printed.startswith("requests: [3, 0]\n")
        assert printed.count("Finished in state Cached") == 1

    choose(page, "Kernel", "Restart Kernel and Clear Outputs of All Cells…")
    page.locator(".jp-Dialog .jp-mod-accept").click()
    blank = page.locator(".jp-CodeCell .jp-InputPrompt").get_by_text("[ ]:")
    playwright.expect(blank).to_have_count(len(stored), timeout=PATIENCE)
    idle(page)
    choose(page, "Run", "Run All Cells")
    check(see(page, executed(stored)), stored)


# A worker of pytest-xdist gets two at once: the longest comes with the shortest.
@lessons([path for path in PATHS[4:] + PATHS[3::-1] if path not in CACHING])
def test_a_lesson_is_right(opened):
    page, stored = opened
    choose(page, "Run", "Run All Cells")
    check(see(page, executed(stored)), stored)

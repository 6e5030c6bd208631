"""What a person waits for: the same work by several means. Makes the figures of notebooks/cost.md.

    python tests/benchmark.py      some twelve minutes, on a machine with nothing else to do
        --postgres postgresql+asyncpg://USER:PASSWORD@HOST:5432/EMPTY_DATABASE   also on PostgreSQL
    python tests/benchmark.py --draw      draws the chart anew from the page's table

Starts a practice API that takes 100 ms for a response and two Prefect servers: the lessons', and
one with Prefect's default settings. Each contender runs in a process of its own, from an empty
cache and then from the full one, in turn with the others. Prints the page's table, to be copied
there, and draws its chart, notebooks/pictures/cost.png. The heartbeat of flow runs is off for all:
it takes a second of each.
"""

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "notebooks" / "cost.md"
CHART = ROOT / "notebooks" / "pictures" / "cost.png"
LATENCY = 0.1  # seconds
WORKERS = 16
NEVER_BINDS = 100_000  # slots of the limit, and requests that the practice API answers


# --- The contenders: each returns a function that does the work -----------------------------------


def ours():
    from pipeline import show_stars

    return show_stars


def usual():
    """The form in which this pipeline is usually shown."""
    import httpx
    from prefect import flow, task
    from prefect.cache_policies import INPUTS
    from prefect.concurrency.sync import rate_limit

    @task(retries=3, cache_policy=INPUTS, cache_expiration=timedelta(days=1))
    def fetch_stats(github_repo):
        rate_limit("github-api")
        response = httpx.get(f"{os.environ['GITHUB_API_URL']}/repos/{github_repo}")
        response.raise_for_status()
        return response.json()

    @task
    def get_stars(repo_stats):
        return repo_stats["stargazers_count"]

    @flow
    def show_stars(github_repos):
        stars = get_stars.map(fetch_stats.map(github_repos)).result()
        for repo, count in zip(github_repos, stars, strict=True):
            print(f"{repo}: {count} stars")

    return show_stars


def plain():
    """No orchestrator: threads, a loop that retries, a file for each answer."""
    from concurrent.futures import ThreadPoolExecutor

    import httpx

    client = httpx.Client(base_url=os.environ["GITHUB_API_URL"])
    folder = Path(os.environ["PREFECT_HOME"], "plain")
    folder.mkdir(parents=True)

    def fetch(repo):
        for seconds in 1, 2, 4:
            with suppress(httpx.HTTPError):
                return client.get(f"/repos/{repo}").raise_for_status().text
            time.sleep(seconds)
        return client.get(f"/repos/{repo}").raise_for_status().text

    def fetch_once_a_day(repo):
        file = folder / repo.replace("/", " ")
        if not file.exists() or time.time() - file.stat().st_mtime > 24 * 3600:
            file.write_text(fetch(repo))
        return json.loads(file.read_text())["stargazers_count"]

    def show_stars(repos):
        with ThreadPoolExecutor(WORKERS) as pool:
            for repo, count in zip(repos, pool.map(fetch_once_a_day, repos), strict=True):
                print(f"{repo}: {count} stars")

    return show_stars


CONTENDERS = {  # name: what does the work, on which Prefect server, with how many repositories
    "this pipeline, lessons' server": (ours, "lessons", (10, 100, 1000)),
    "this pipeline, default server": (ours, "default", (10, 100)),
    "the usual form, default server": (usual, "default", (10, 100)),
    "plain Python": (plain, "lessons", (10, 100, 1000)),
}
ON_POSTGRES = {
    "this pipeline, PostgreSQL": (ours, "postgres", (10, 100)),
    "the usual form, PostgreSQL": (usual, "postgres", (10, 100)),
}


def measure(contender: str, count: int) -> list[float]:
    """In a process of its own: seconds from an empty cache, and from the full one."""
    import httpx
    from prefect.settings import get_current_settings

    get_current_settings().flows.heartbeat_frequency = None
    work = (CONTENDERS | ON_POSTGRES)[contender][0]()

    def requests():
        return httpx.get(os.environ["GITHUB_API_URL"] + "/rate_limit").json()["rate"]["used"]

    work(["load-test/first"])  # the first run of a process has more to do
    times = []
    for expected in count, 0:
        used, begin = requests(), time.perf_counter()
        work([f"load-test/{n}" for n in range(count)])
        times.append(time.perf_counter() - begin)
        assert requests() - used == expected, contender
    return times


# --- All of them, in turn -------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3, help="how often (3); 1,000 only once")
    parser.add_argument("--postgres", metavar="URL", help="of an empty database with pg_trgm")
    parser.add_argument("--draw", action="store_true", help="draw the chart of the page's table")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT / "notebooks"))
    if arguments.draw:
        draw(seconds_of_the_page())
        return
    if arguments.measure:
        contender, count = arguments.measure
        with open(os.devnull, "w") as nowhere:
            sys.stdout, stdout = nowhere, sys.stdout
            print(json.dumps(measure(contender, int(count))), file=stdout)
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no server is left behind
    if arguments.postgres:
        CONTENDERS.update(ON_POSTGRES)
    with tempfile.TemporaryDirectory(prefix="benchmark-", ignore_cleanup_errors=True) as folder:
        os.environ["LESSONS_HOME"] = folder
        import lesson

        try:
            compare(Path(folder), arguments.repeat, arguments.postgres)
        finally:
            lesson.stop_server()


def compare(folder: Path, repeat: int, postgres: str | None) -> None:
    import httpx

    import lesson
    from fake_github import FakeGitHub

    def python(*command, **variables):
        common = {
            "GITHUB_API_URL": github.url,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'notebooks'}",
            "PREFECT_LOGGING_LEVEL": "WARNING",
        }
        return subprocess.run(
            [sys.executable, *command],
            env=lesson.isolated(common | variables),
            cwd=folder,
            text=True,
            stdout=subprocess.PIPE,
            check=True,
        ).stdout

    def run(contender, count):
        shutil.rmtree(folder / "cold", ignore_errors=True)
        url = servers[CONTENDERS[contender][1]]
        home = {"PREFECT_HOME": str(folder / "cold"), "PREFECT_API_URL": f"{url}/api"}
        times = json.loads(python(__file__, "--measure", contender, str(count), **home))
        print(f"{contender}, {count}: {times[0]:.1f} / {times[1]:.1f}", file=sys.stderr)
        return times

    def run_script():
        """`python pipeline.py` where no Prefect server is configured, on a new home and again."""
        home = {"PREFECT_HOME": tempfile.mkdtemp(dir=folder)}
        times = []
        for _ in range(2):
            begin = time.perf_counter()
            python(ROOT / "pipeline.py", *(f"load-test/{n}" for n in range(50)), **home)
            times.append(time.perf_counter() - begin)
        print("the whole command:", times, file=sys.stderr)
        return times

    with ExitStack() as stack:
        github = stack.enter_context(FakeGitHub(LATENCY, NEVER_BINDS))
        servers = {"lessons": lesson.start_server()}
        servers["default"] = stack.enter_context(server(folder / "default"))
        if postgres:
            database = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": postgres}
            servers["postgres"] = stack.enter_context(server(folder / "postgres", database))
        limit = {"name": "github-api", "limit": NEVER_BINDS, "slot_decay_per_second": 1}
        for url in servers.values():
            httpx.post(f"{url}/api/v2/concurrency_limits/", json=limit).raise_for_status()
        measured = {}
        for turn in range(repeat):
            for contender, (_, _, counts) in CONTENDERS.items():
                for count in counts if turn == 0 else counts[:2]:
                    measured.setdefault((contender, count), []).append(run(contender, count))
        scripts = [run_script() for _ in range(2)]
    medians = {
        key: [statistics.median(times) for times in zip(*runs, strict=True)]
        for key, runs in measured.items()
    }
    report(medians, scripts)
    draw({name: medians[name, 100][0] for name in CONTENDERS})


@contextmanager
def server(home: Path, database: dict[str, str] | None = None):
    """A Prefect server with Prefect's default settings. Yields its address."""
    import httpx

    import lesson
    from background import free_port

    port = free_port((0,))
    url = f"http://127.0.0.1:{port}"
    settings = {"PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "no"}
    with subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)],
        env=lesson.isolated(settings | (database or {})),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            while process.poll() is None:
                with suppress(httpx.TransportError):
                    httpx.get(f"{url}/api/health").raise_for_status()
                    break
                time.sleep(0.5)
            yield url
        finally:
            process.terminate()


# --- What is shown --------------------------------------------------------------------------------


def report(medians: dict, scripts: list) -> None:
    print("\n| repositories |", *(f" {name} |" for name in CONTENDERS), sep="")
    print("|--:|", "--:|" * len(CONTENDERS), sep="")
    for count in 10, 100, 1000:
        row = [medians.get((name, count)) for name in CONTENDERS]
        cells = [f"{cold:.1f} / {warm:.1f}" for cold, warm in filter(None, row)]
        cells = [cells.pop(0) if times else "not run" for times in row]
        print(f"| {count:,} |", *(f" {cell} |" for cell in cells), sep="")
    print("\nTimes as long as plain Python, from an empty cache and from the full one:")
    for (name, count), (cold, warm) in medians.items():
        plain_cold, plain_warm = medians["plain Python", count]
        print(f"{name}, {count}: {cold / plain_cold:.1f}, {warm / plain_warm:.0f}")
    print("\n50 repositories by `python pipeline.py` without a server, in seconds:")
    for name, times in zip(("the first time", "again"), zip(*scripts, strict=True), strict=True):
        print(f"{name}: {min(times):.0f} to {max(times):.0f}")


def seconds_of_the_page() -> dict[str, float]:
    """For 100 repositories from an empty cache, by contender, as the page's table has them."""
    table = re.findall(r"^\| (?:repositories|100) \|(.+)\|$", PAGE.read_text(), re.M)
    names, cells = ([cell.strip() for cell in row.split("|")] for row in table)
    return {name: float(cell.split("/")[0]) for name, cell in zip(names, cells, strict=True)}


def draw(seconds: dict[str, float]) -> None:
    import matplotlib.pyplot as plt

    from charts import BLUE, GREY, ORANGE

    plt.style.use(ROOT / "notebooks" / "matplotlibrc")
    names = sorted(seconds, key=seconds.get)
    color = [GREY if "plain" in name else ORANGE if "usual" in name else BLUE for name in names]
    figure, axes = plt.subplots(figsize=(8, 0.8 + 0.45 * len(names)))
    bars = axes.barh(names, [seconds[name] for name in names], height=0.7, color=color)
    axes.bar_label(bars, fmt="{:g} s", padding=5)
    axes.tick_params(length=0)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    axes.margins(x=0.1)
    figure.suptitle("100 repositories, from an empty cache", x=0.01, ha="left")
    figure.savefig(CHART, bbox_inches="tight")


if __name__ == "__main__":
    main()

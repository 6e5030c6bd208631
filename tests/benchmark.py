"""What a person waits for: the same work by four means. Makes the figures of notebooks/cost.md.

    python tests/benchmark.py      some twelve minutes, on a machine with nothing else to do

Starts a practice API that takes 100 ms for an answer and two Prefect servers: the lessons', and one
with Prefect's default settings. Each contender runs in a process of its own, from an empty cache
and then from the full one, in turn with the others. Prints the page's table and draws its chart,
notebooks/pictures/cost.png. The heartbeat of flow runs is off for all: it takes a second of each.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).parents[1]
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
    "this pipeline": (ours, "lessons", (10, 100, 1000)),
    "this pipeline, default server": (ours, "default", (10, 100)),
    "the usual form, default server": (usual, "default", (10, 100)),
    "plain Python": (plain, "lessons", (10, 100, 1000)),
}


def measure(contender: str, count: int) -> list[float]:
    """In a process of its own: seconds from an empty cache, and from the full one."""
    import httpx
    from prefect.settings import get_current_settings

    get_current_settings().flows.heartbeat_frequency = None
    work = CONTENDERS[contender][0]()

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
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        contender, count = arguments.measure
        with open(os.devnull, "w") as nowhere:
            sys.stdout, stdout = nowhere, sys.stdout
            print(json.dumps(measure(contender, int(count))), file=stdout)
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no server is left behind
    sys.path.insert(0, str(ROOT / "notebooks"))
    with tempfile.TemporaryDirectory(prefix="benchmark-", ignore_cleanup_errors=True) as folder:
        os.environ["LESSONS_HOME"] = folder
        import lesson

        try:
            compare(Path(folder), arguments.repeat)
        finally:
            lesson.stop_server()


def compare(folder: Path, repeat: int) -> None:
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

    with FakeGitHub(LATENCY, NEVER_BINDS) as github, default_server(folder) as default:
        servers = {"lessons": lesson.start_server(), "default": default}
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
    draw(medians)


@contextmanager
def default_server(folder: Path):
    """A Prefect server with Prefect's default settings. Yields its address."""
    import httpx

    import lesson
    from background import free_port

    port = free_port((0,))
    url = f"http://127.0.0.1:{port}"
    settings = {"PREFECT_HOME": str(folder / "default"), "PREFECT_SERVER_ANALYTICS_ENABLED": "no"}
    with subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)],
        env=lesson.isolated(settings),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as server:
        try:
            while server.poll() is None:
                with suppress(httpx.TransportError):
                    httpx.get(f"{url}/api/health").raise_for_status()
                    break
                time.sleep(0.5)
            yield url
        finally:
            server.terminate()


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


def draw(medians: dict) -> None:
    import matplotlib.pyplot as plt

    from charts import BLUE, GREY, ORANGE

    plt.style.use(ROOT / "notebooks" / "matplotlibrc")
    figure, axes = plt.subplots(figsize=(8, 4))
    styles = (BLUE, "-"), (BLUE, "--"), (ORANGE, "--"), (GREY, "-")
    for (name, (_, _, counts)), (color, style) in zip(CONTENDERS.items(), styles, strict=True):
        seconds = [medians[name, count][0] for count in counts]
        axes.plot(counts, seconds, style, color=color, marker="o")
        label = name.replace(", ", ",\n")
        axes.text(counts[-1] * 1.15, seconds[-1], label, color=color, va="bottom")
    axes.set(xscale="log", yscale="log", xlabel="repositories", ylabel="seconds (log scale)")
    axes.set_xticks([10, 100, 1000], ["10", "100", "1,000"], minor=False)
    axes.yaxis.set_major_formatter("{x:g}")
    figure.suptitle("What the work costs, from an empty cache", x=0.01, ha="left")
    figure.savefig(CHART, bbox_inches="tight")


if __name__ == "__main__":
    main()

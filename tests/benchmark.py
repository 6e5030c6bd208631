"""What a person waits for: the same work by different means, measured in one run.

    pip install tenacity diskcache       for the contender without Prefect
    python tests/benchmark.py            a quarter of an hour; --repeat 1 for a first look; 1,000
                                         repositories once only
    python tests/benchmark.py --chart cost.png

Starts a practice API with 100 ms of latency and two Prefect servers, that of the lessons and one
with Prefect's default settings. Each contender runs in a process of its own, cold and then warm
(from its cache), in turn with the others. Times vary from machine to machine and from hour to hour:
read the ratios. The heartbeat of flow runs is off for all; with it, each run takes a second more.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from math import ceil
from pathlib import Path

ROOT = Path(__file__).parents[1]
LATENCY = 0.1  # seconds
WORKERS = 16
NEVER_BINDS = 100_000  # slots of the limit, and requests that the practice API answers
SIZES = 3, 30, 300, 1000


# --- The contenders: each returns a function that does the work once, and can be called again -----


def ours(limit=True):
    import pipeline

    if not limit:
        pipeline.Gate.take_slot = lambda self: None
    return pipeline.show_stars


def tutorial(limit=True):
    """The form in which this pipeline is usually shown: no pool of connections, no cap."""
    import httpx
    from prefect import flow, task
    from prefect.cache_policies import INPUTS
    from prefect.concurrency.sync import rate_limit

    @task(retries=3, cache_policy=INPUTS, cache_expiration=timedelta(days=1))
    def fetch_stats(github_repo):
        if limit:
            rate_limit("github-api")
        response = httpx.get(f"{os.environ['GITHUB_API_URL']}/repos/{github_repo}")
        response.raise_for_status()
        return response.json()

    @task
    def get_stars(repo_stats):
        return repo_stats["stargazers_count"]

    @flow
    def show_stars(github_repos):
        futures = fetch_stats.map(github_repos)
        stars = get_stars.map(futures).result()
        for repo, count in zip(github_repos, stars, strict=True):
            print(f"{repo}: {count} stars")

    return show_stars


def plain():
    """No orchestrator: a pool of threads, tenacity, and a cache on disk."""
    from concurrent.futures import ThreadPoolExecutor

    import diskcache
    import httpx
    import tenacity

    cache = diskcache.Cache(os.path.join(os.environ["PREFECT_HOME"], "plain"))
    client = httpx.Client(base_url=os.environ["GITHUB_API_URL"])

    @tenacity.retry(
        stop=tenacity.stop_after_attempt(4), wait=tenacity.wait_exponential_jitter(1), reraise=True
    )
    def fetch(repo):
        response = client.get(f"/repos/{repo}")
        response.raise_for_status()
        return response.json()

    def fetch_once_a_day(repo):
        if (stats := cache.get(repo)) is None:
            stats = fetch(repo)
            cache.set(repo, stats, expire=24 * 3600)
        return stats["stargazers_count"]

    def show_stars(repos):
        with ThreadPoolExecutor(WORKERS) as pool:
            for repo, count in zip(repos, pool.map(fetch_once_a_day, repos), strict=True):
                print(f"{repo}: {count} stars")

    return show_stars


def floor():
    """Prefect itself: a task that does nothing, mapped as often as the others map theirs."""
    from prefect import flow, task
    from prefect.task_runners import ThreadPoolTaskRunner

    @task
    def nothing(number):
        return None

    @flow(task_runner=ThreadPoolTaskRunner(max_workers=WORKERS), persist_result=False)
    def show_nothing(repos):
        for _ in range(2):
            nothing.map(range(len(repos))).wait()

    return show_nothing


OURS, TUTORIAL, PLAIN = "this pipeline", "the usual form", "plain Python"
DEFAULT = "this pipeline, default server"  # so has the usual form; the others the lessons'
NO_LIMIT, FLOOR = ", no limit", "empty tasks, as many"
CONTENDERS = {  # name: what does the work, and how many task runs it makes for each repository
    OURS: (ours, 2),
    OURS + NO_LIMIT: (partial(ours, limit=False), 2),
    TUTORIAL: (tutorial, 2),
    TUTORIAL + NO_LIMIT: (partial(tutorial, limit=False), 2),
    DEFAULT: (ours, 2),
    FLOOR: (floor, 2),
    PLAIN: (plain, 0),
}


LONG = defaultdict(lambda: SIZES[-1], {TUTORIAL: 30, TUTORIAL + NO_LIMIT: 300, DEFAULT: 300})


def measure(contender: str, count: int) -> dict[str, float]:
    """In a process of its own: do the work cold, then warm. Returns seconds, requests, megabytes.

    "behind" is how long Prefect's server took after the end to have all task runs as completed.
    """
    import httpx
    from prefect.settings import get_current_settings

    get_current_settings().flows.heartbeat_frequency = None
    make, runs_each = CONTENDERS[contender]
    work = make()
    completed = {"task_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}

    def recorded():
        return httpx.post(os.environ["PREFECT_API_URL"] + "/task_runs/count", json=completed).json()

    def requests():
        answer = httpx.get(os.environ["GITHUB_API_URL"] + "/rate_limit").json()
        return answer["rate"]["used"]

    figures, runs, used = {}, recorded(), requests()
    for name, repos in {
        "first": ["load-test/first"],  # the first run of a process has more to do
        "cold": [f"load-test/{n}" for n in range(count)],
        "warm": [f"load-test/{n}" for n in range(count)],
    }.items():
        begin = time.perf_counter()
        work(repos)
        end = time.perf_counter()
        runs += runs_each * len(repos)
        while recorded() < runs:
            time.sleep(0.1)
        figures[name], figures[f"{name} behind"] = end - begin, time.perf_counter() - end
        figures[f"{name} requests"], used = requests() - used, requests()
    figures["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return figures


# --- The first result in a fresh process ----------------------------------------------------------

FIRST = {
    "import prefect, and an empty flow": """
import prefect
prefect.settings.get_current_settings().flows.heartbeat_frequency = None
prefect.flow(lambda: None, name="nothing")()
""",
    "set-up cell, and three repositories": """
import lesson
github = lesson.start()
from pipeline import REPOS, show_stars
show_stars(REPOS)
""",
}
AGAIN = """
import lesson, time
lesson.start()
begin = time.perf_counter()
lesson.start()
print(time.perf_counter() - begin)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--repeat", type=int, default=3, help="how often (default 3)")
    parser.add_argument("--chart", type=Path, help="where to save the chart of cost against N")
    arguments = parser.parse_args()
    if arguments.measure:
        contender, count = arguments.measure
        sys.stdout, stdout = open(os.devnull, "w"), sys.stdout  # noqa: SIM115
        print(json.dumps(measure(contender, int(count))), file=stdout)
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no server is left behind
    folder = Path(tempfile.mkdtemp(prefix="benchmark-"))
    os.environ["LESSONS_HOME"] = str(folder / "lessons")
    sys.path.insert(0, str(ROOT / "notebooks"))
    try:
        compare(folder, arguments.repeat, arguments.chart)
    finally:
        import lesson

        lesson.stop_server()
        shutil.rmtree(folder, ignore_errors=True)


def compare(folder: Path, repeat: int, chart: Path | None) -> None:
    import lesson
    from fake_github import FakeGitHub

    def environment(url, home):
        return lesson.isolated(
            lesson.KERNEL_SETTINGS
            | {
                "PREFECT_API_URL": f"{url}/api",
                "PREFECT_HOME": home,
                "GITHUB_API_URL": github.url,
                "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'notebooks'}",
                "PREFECT_LOGGING_LEVEL": "WARNING",
            }
        )

    def python(*command, env):
        done = subprocess.run(
            [sys.executable, *command], env=env, cwd=folder, text=True, capture_output=True
        )
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        return done.stdout

    def run(contender, count):
        shutil.rmtree(folder / "cold", ignore_errors=True)
        url = default if contender in (TUTORIAL, DEFAULT) else tuned
        env = environment(url, str(folder / "cold"))
        python("-c", LIMIT, env=env)
        print(f"{contender} {count} …", end=" ", file=sys.stderr, flush=True)
        figures = json.loads(python(__file__, "--measure", contender, str(count), env=env))
        print({name: round(value, 1) for name, value in figures.items()}, file=sys.stderr)
        return figures

    def run_script():
        """Seconds of `python pipeline.py` without a Prefect server, on a fresh home and again."""
        home = tempfile.mkdtemp(dir=folder)
        env = environment("", home)
        for name in ("PREFECT_API_URL", "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE"):
            del env[name]
        times = []
        for _ in range(2):
            begin = time.perf_counter()
            python(ROOT / "pipeline.py", *(f"load-test/{n}" for n in range(50)), env=env)
            times.append(time.perf_counter() - begin)
        return times

    with FakeGitHub(LATENCY, NEVER_BINDS) as github, default_server(folder) as default:
        tuned = lesson.start_server()
        measured = defaultdict(list)
        for turn in range(repeat):
            for count in SIZES:
                for contender in CONTENDERS:
                    if count > LONG[contender] or (count == SIZES[-1] and turn):
                        continue  # it would take minutes
                    measured[contender, count].append(run(contender, count))
            for contender in OURS, TUTORIAL, DEFAULT:
                measured[contender, 60].append(run(contender, 60))
        script = [run_script() for _ in range(3 * repeat)]
        firsts, again = defaultdict(list), []
        for _ in range(2 * repeat):
            env = environment(tuned, str(lesson.HOME))
            python("-c", LIMIT, env=env)
            for name, code in FIRST.items():
                begin = time.perf_counter()
                python("-c", code, env=env)
                firsts[name].append(time.perf_counter() - begin)
            again.append(float(python("-c", AGAIN, env=env).split()[-1]))
    report(measured, {name: statistics.median(times) for name, times in firsts.items()}, again)
    print("\n50 repositories by `python pipeline.py`, no server: seconds, the median and the worst")
    for name, times in zip(("fresh home", "again"), zip(*script, strict=True), strict=True):
        print(f"{name}: {statistics.median(times):.1f}, {max(times):.1f}")
    if chart:
        draw(measured, chart)


LIMIT = f"""
import os
url = os.environ["PREFECT_API_URL"]
import lesson  # drops all settings of Prefect
os.environ["PREFECT_API_URL"] = url
lesson.new_limit("github-api", {NEVER_BINDS}, 1)  # with all its slots free
"""


@contextmanager
def default_server(folder: Path):
    """A Prefect server with Prefect's default settings. Yields its address."""
    import lesson

    url = f"http://127.0.0.1:{lesson.free_port((0,))}"
    server = subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start", "--port", url.rpartition(":")[2]],
        env=lesson.isolated(lesson.KERNEL_SETTINGS | {"PREFECT_HOME": str(folder / "default")}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        import httpx

        while server.poll() is None:
            with suppress(httpx.TransportError):
                httpx.get(f"{url}/api/health").raise_for_status()
                break
            time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait()


# --- What is shown --------------------------------------------------------------------------------


ALONE = {count: ceil(count / WORKERS) * LATENCY for count in SIZES}  # the latency, in seconds


def median_of(measured: dict, contender: str, count: int, *names: str) -> float:
    runs = measured[contender, count]
    return statistics.median(sum(figures[name] for name in names) for figures in runs)


def report(measured: dict, firsts: dict[str, float], again: list[float]) -> None:
    median = partial(median_of, measured)
    print("Seconds, cold / warm (times as much as plain Python, cold / warm):\n")
    print("| N |", *(f" {name} |" for name in CONTENDERS), sep="")
    print("|--:|", "--:|" * len(CONTENDERS), sep="")
    for count in SIZES:
        cells = []
        for contender in CONTENDERS:
            if (contender, count) in measured:
                cold, warm = (median(contender, count, name) for name in ("cold", "warm"))
                times = [cold / median(PLAIN, count, "cold"), warm / median(PLAIN, count, "warm")]
                cells.append(f"{cold:.1f} / {warm:.1f} ({times[0]:.1f} / {times[1]:.0f})")
            else:
                cells.append("-")
        print(f"| {count} |", *(f" {cell} |" for cell in cells), sep="")
    alone = ", ".join(f"{seconds:.1f} for {count}" for count, seconds in ALONE.items())
    print(f"\nThe latency alone, seconds: {alone}")

    ours = partial(median, OURS)
    rows = [
        (
            "60, limit on: the usual form takes … times as long",
            median(TUTORIAL, 60, "cold") / ours(60, "cold"),
            "at least 10",
        ),
        (
            "300: the limit costs a factor of",
            ours(300, "cold") / median(OURS + NO_LIMIT, 300, "cold"),
            "at most 1.35",
        ),
        (
            "60, a default server: the usual form takes … times as long",
            median(TUTORIAL, 60, "cold") / median(DEFAULT, 60, "cold"),
            "",
        ),
        *(
            (
                f"300, {name}, no limit: the usual form takes … times as long",
                median(TUTORIAL + NO_LIMIT, 300, name) / median(OURS + NO_LIMIT, 300, name),
                "at least 2",
            )
            for name in ("cold", "warm")
        ),
        *(
            (
                f"300, {name}: the same, until the server has it all",
                median(TUTORIAL + NO_LIMIT, 300, name, f"{name} behind")
                / median(OURS + NO_LIMIT, 300, name, f"{name} behind"),
                "",
            )
            for name in ("cold", "warm")
        ),
        *(
            (
                f"{count}, warm: times as long as empty tasks",
                ours(count, "warm") / median(FLOOR, count, "warm"),
                "at most 1.3",
            )
            for count in SIZES
        ),
        ("warm: requests, at any N", sum(ours(count, "warm requests") for count in SIZES), "0"),
        (
            "1,000 against 300, per repository",
            ours(1000, "cold") / 1000 / (ours(300, "cold") / 300),
            "about 1",
        ),
        ("1,000: megabytes in the client", ours(1000, "memory"), "under 250"),
        ("300: seconds until the server has it all", ours(300, "cold behind"), "at most 5"),
        (
            "first result in a fresh process, against an empty flow",
            firsts["set-up cell, and three repositories"]
            / firsts["import prefect, and an empty flow"],
            "at most 1.5",
        ),
        ("set-up cell again: seconds", statistics.median(again), "under 0.1"),
    ]
    print("\n| | measured | wanted |\n|:--|--:|--:|")
    for what, figure, wanted in rows:
        print(f"| {what} | {figure:.2f} | {wanted} |")


def draw(measured: dict, file: Path) -> None:
    import matplotlib.pyplot as plt

    from charts import BLUE, GREY, ORANGE

    plt.style.use(ROOT / "notebooks" / "matplotlibrc")
    figure, axes = plt.subplots(figsize=(8, 4.5))
    alone, dashed = "the latency alone", "dashed: a default server"
    costs = defaultdict(dict, {alone: ALONE})
    for name, count in sorted(measured):
        costs[name][count] = median_of(measured, name, count, "cold")
    lines = {
        TUTORIAL: (ORANGE, "--"),
        TUTORIAL + NO_LIMIT: (ORANGE, ":"),
        DEFAULT: (BLUE, "--"),
        OURS: (BLUE, "-"),
        FLOOR: (BLUE, ":"),
        PLAIN: (GREY, "-"),
        alone: (GREY, ":"),
    }
    for name, (color, style) in lines.items():
        sizes, seconds = costs[name].keys(), costs[name].values()
        axes.plot(sizes, seconds, style, color=color, marker="o", label=name)
    axes.legend(labelcolor="linecolor", loc="upper left", bbox_to_anchor=(1, 1), title=dashed)
    axes.set(xscale="log", yscale="log", xlabel="repositories", ylabel="seconds (log scale)")
    axes.set_xticks(SIZES, [f"{count:,}" for count in SIZES])
    axes.yaxis.set_major_formatter("{x:g}")
    figure.suptitle("What the work costs, from an empty cache", x=0.01, ha="left")
    figure.savefig(file, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()

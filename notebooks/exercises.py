"""The checks of "Your turn", one for each lesson, and what they have in common.

A check looks at what happened: the states of the runs, and the practice API's log of requests. It
never reads the answer's text. Each claim holds, does not hold, or was not reached, because the
experiment in which it could be seen did not take place.
"""

import io
import json
from contextlib import redirect_stdout
from datetime import datetime
from html import escape

from IPython.display import display
from prefect import flow

import lesson

HOLDS, FAILS, NOT_REACHED = "holds", "does not hold", "not reached"
MARKS = {HOLDS: ("✓", "#1a7f37"), FAILS: ("✗", "#b42318"), NOT_REACHED: ("\N{EN DASH}", "#6b7280")}


class Coloured:
    """A table whose verdicts are coloured in a notebook, and the same as plain text elsewhere.

    title: stands above the table
    rows: their cells; one that is a verdict, a key of MARKS, gets its mark and its colour
    text: the plain text
    head: the names of the columns, if they have names
    """

    def __init__(self, title: str, rows, text: str, head=()):
        self.title, self.rows, self.text, self.head = title, rows, text, head

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        lines = [[f"<th {LEFT}>{escape(name)}</th>" for name in self.head]] if self.head else []
        lines += [[coloured(str(cell)) for cell in row] for row in self.rows]
        table = "\n".join(f"<tr>{''.join(cells)}</tr>" for cells in lines)
        return f"<b>{escape(self.title)}</b>\n<table>\n{table}\n</table>"


LEFT = 'style="text-align: left"'
BADGE = "color: white; padding: 1px 8px; border-radius: 9px; white-space: nowrap"


def coloured(text: str) -> str:
    """A cell of a table, in HTML."""
    if text not in MARKS:
        return f"<td {LEFT}>{escape(text)}</td>"
    mark, colour = MARKS[text]
    return f'<td {LEFT}><span style="background: {colour}; {BADGE}">{mark} {text}</span></td>'


def verdict(holds: bool, reached: bool = True) -> str:
    """What to say of a claim; one that was not reached can neither hold nor fail."""
    return (HOLDS if holds else FAILS) if reached else NOT_REACHED


def tell(*claims: tuple[str, str, object]) -> None:
    """Show a line for each claim: its verdict, its words, the evidence. And whether all hold."""
    result = "Solved." if all(what == HOLDS for _, what, _ in claims) else "Not yet."
    text = [f"{what:<13} | {words}: {evidence}" for words, what, evidence in claims]
    rows = [(what, words, evidence) for words, what, evidence in claims]
    display(Coloured(result, rows, "\n".join([*text, result])))


def stars_printed(show_stars, github_repos: list[str]):
    """Run a flow without its logs. Returns its state and the repositories of its "stars" lines."""
    with lesson.quiet(), redirect_stdout(io.StringIO()) as page:
        state = show_stars(github_repos, return_state=True)
    lines = page.getvalue().splitlines()
    return state, [line.partition(":")[0] for line in lines if line.endswith(" stars")]


def exception_in(state) -> str:
    """The exception of a flow run that failed, as its state's message has it."""
    return str(state.message).removeprefix("Flow run encountered an exception: ")


def outcome(state) -> str:
    """The type of a run's state and, if it failed, the exception, which the log would tell."""
    if state.is_completed():
        return state.type.value
    return f"{state.type.value} ({exception_in(state).partition(' for url')[0]:.60})"


# --- 1 · A first flow -----------------------------------------------------------------------------


def check_first_flow(github, show_stars) -> None:
    """Whether one 503 costs one of three repositories, and the run then fails."""
    repos = ["PrefectHQ/prefect", "pydantic/pydantic", "huggingface/transformers"]
    github.reset()
    whole, _ = stars_printed(show_stars, repos)
    github.reset()
    github.fail(repos[1], status=503)
    state, printed = stars_printed(show_stars, repos)
    statuses = github.requests["status"].tolist()
    met, good = 503 in statuses, [repos[0], repos[2]]
    tell(
        ("all three are asked", verdict(statuses == [200, 503, 200], met), statuses),
        ("the two good counts are printed", verdict(printed == good, met), printed),
        ("the run fails", verdict(state.is_failed(), met), outcome(state)),
        ("without the 503 the run completes", verdict(whole.is_completed()), outcome(whole)),
    )


# --- 2 · Retries ----------------------------------------------------------------------------------


def check_retries(github, fetch) -> None:
    """Whether a task survives four seconds of 503 in three requests, and asks once for a 404."""

    @flow
    def fetch_one(github_repo):
        fetch(github_repo)

    github.reset()
    with lesson.quiet():
        fetch_one("PrefectHQ/perfect", return_state=True)
    missing = github.requests["status"].tolist()
    github.reset()
    github.fail("pydantic/pydantic", status=503, times=2)
    with lesson.quiet():
        state = fetch_one("pydantic/pydantic", return_state=True)
    statuses, times = github.requests["status"].tolist(), github.requests["time"]
    third, after = len(statuses) >= 3, int(max(times, default=0))
    tell(
        ("two bad answers, then a good one", verdict(statuses == [503, 503, 200]), statuses),
        ("the run completes", verdict(state.is_completed(), third), outcome(state)),
        ("the third request comes after 4 s", verdict(after >= 4, third), f"after {after} s"),
        ("a 404 gets one request", verdict(missing == [404], 404 in missing), missing),
    )


# --- 3 · Mapping ----------------------------------------------------------------------------------


def check_mapping(github, mapped) -> None:
    """Whether one misspelt name costs one of eight results, with three requests at a time."""
    repos = github.repositories["full_name"].head(8).tolist()
    misspelt = [*repos[:2], "django/djagno", *repos[3:]]
    github.reset()
    whole, all_printed = stars_printed(mapped, repos)
    github.reset()
    github.latency = 0.4
    state, printed = stars_printed(mapped, misspelt)
    asked, at_once = set(github.requests["repository"]), github.in_flight_max
    met, good = asked == set(misspelt), [*repos[:2], *repos[3:]]
    message = exception_in(state)
    named = misspelt[2] in message
    complete = whole.is_completed() and all_printed == repos
    tell(
        ("all eight are asked", verdict(met), f"{len(asked)} asked"),
        ("three at a time", verdict(at_once == 3, met), f"{at_once} at once"),
        ("seven lines in the order asked", verdict(printed == good, met), f"{len(printed)} lines"),
        ("the run fails", verdict(state.is_failed(), met), state.type.value),
        ("its message names the misspelt one", verdict(named, state.is_failed()), f"{message:.50}"),
        ("with eight good names the run completes", verdict(complete), outcome(whole)),
    )


# --- 4 · Rate limiting ----------------------------------------------------------------------------


def check_rate_limiting(github) -> None:
    """Eighteen repositories under a limit of the reader's size; the API answers 15 in 3 seconds.

    The requests are judged, not the states: whatever is refused is tried again, and completed.
    """
    log = github.requests
    answered = log[log["status"] == 200]
    count = answered["repository"].nunique()
    in_time = answered[answered["time"] + answered["duration"] <= 10]["repository"].nunique()
    small_api = (github.rate_limit, github.rate_window) == (15, 3)
    statuses = ", ".join(map(str, sorted(log["status"].unique())))
    tell(
        ("the API answers for all 18", verdict(count == 18, not log.empty), f"{count} of 18"),
        (
            "no request is refused",
            verdict((log["status"] == 200).all(), small_api and len(log) >= 18),
            f"statuses {statuses or 'none'}",
        ),
        (
            "all within ten seconds",
            verdict(in_time == 18, count == 18),
            f"{in_time} of 18 by then",
        ),
    )


# --- 5 · Caching ----------------------------------------------------------------------------------


def check_caching(github, fetch) -> None:
    """Three runs with the reader's task; the first answer has status 200 and no star count in it.

    fetch: a task that takes a repository and returns the API's object
    """
    from pipeline import REPOS, get_stars

    @flow
    def count_stars():
        return get_stars(fetch(REPOS[0]))

    lesson.clear_cache()
    github.reset()
    github.fail(REPOS[0], body={"message": "try later"})
    seen = []
    with lesson.quiet():
        for _ in range(3):
            state = count_stars(return_state=True)
            seen.append((state, len(github.requests)))
    (first, _), (second, asked), (third, in_all) = seen
    useless = github.requests["fault"].any()
    after = [f"{outcome(state)}, requests so far: {count}" for state, count in seen]
    tell(
        ("the useless answer fails the first run", verdict(first.is_failed(), useless), after[0]),
        (
            "the second run asks again and completes",
            verdict(second.is_completed() and asked == 2, useless and first.is_failed()),
            after[1],
        ),
        (
            "the third completes without a request",
            verdict(third.is_completed() and in_all == asked, second.is_completed()),
            after[2],
        ),
    )


# --- 6 · The star chart ---------------------------------------------------------------------------


def check_star_chart(github, show_forks) -> None:
    """Whether a flow prints forks, keeps an answer for an hour, and is as resilient as before.

    show_forks: a flow that takes repositories
    """
    figures = {"PrefectHQ/prefect": 101, "pydantic/pydantic": 102, "huggingface/transformers": 103}
    wanted = [f"{repo}: {forks} forks" for repo, forks in figures.items()]
    lesson.clear_cache()
    lesson.new_limit("github-api", 5000, 5000 / 3600)
    github.reset()
    github.fail("pydantic/pydantic", status=503)
    for repo, forks in figures.items():  # known to nobody who has not asked in this run
        github.fail(repo, fields={"forks_count": forks}, times=None)
    with lesson.quiet(), redirect_stdout(io.StringIO()) as page:
        state = show_forks(list(figures), return_state=True)
    lines, log, kept = page.getvalue().splitlines(), github.requests, minutes_kept()
    with lesson.quiet(), redirect_stdout(io.StringIO()):
        show_forks(list(figures), return_state=True)
    statuses = sorted(log["status"])
    asked, more = set(log["repository"]) == set(figures), len(github.requests) - len(log)
    printed = lines[0] if lines else outcome(state)
    times = ", ".join(f"{minutes} minutes" for minutes in kept) or "without an end"
    again, done = statuses == [200, 200, 200, 503], state.is_completed()
    tell(
        ("three lines with the forks", verdict(lines == wanted, asked), printed),
        ("an answer is kept for 60 minutes", verdict(kept == [60], asked), times),
        ("a 503 is asked again", verdict(again, asked), statuses),
        ("the second run sends nothing", verdict(more == 0, done), f"{more} requests"),
    )


def minutes_kept() -> list[int]:
    """After how many minutes the results in the cache expire, from when they were saved."""
    kept = set()
    for file in lesson.saved_files():
        if until := json.loads(file.read_text())["metadata"]["expiration"]:
            seconds = datetime.fromisoformat(until).timestamp() - file.stat().st_mtime
            kept.add(round(seconds / 60))
    return sorted(kept)


# --- 7 · Scaling out ------------------------------------------------------------------------------


def check_scaling_out(github, stars_of) -> None:
    """Whether a flow gives back what its tasks found in the worker processes of a Dask cluster.

    stars_of: a flow that takes repositories and returns `{repo: stars}`
    """
    from distributed import Client, LocalCluster, get_task_stream
    from prefect_dask import DaskTaskRunner

    figures = {"PrefectHQ/prefect": 101, "pydantic/pydantic": 102, "huggingface/transformers": 103}
    github.reset()
    for repo, stars in figures.items():  # known to nobody who has not asked in this run
        github.fail(repo, fields={"stargazers_count": stars}, times=None)
    quiet_workers = {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL"}
    options = {"dashboard_address": "127.0.0.1:0", "local_directory": lesson.HOME}
    with (
        lesson.quiet(),
        LocalCluster(n_workers=1, threads_per_worker=4, env=quiet_workers, **options) as cluster,
        Client(cluster) as client,
        get_task_stream(client) as record,
    ):
        task_runner = DaskTaskRunner(address=cluster.scheduler_address)
        try:
            found = stars_of.with_options(task_runner=task_runner)(list(figures))
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
    log, runs = github.requests, len(record.data)
    answered = set(log["repository"][log["status"] == 200])
    tell(
        ("all three are asked", verdict(answered == set(figures)), log["status"].tolist()),
        ("Dask's workers ask", verdict(runs >= 3, bool(answered)), f"{runs} task runs"),
        ("the flow returns their stars", verdict(found == figures, runs >= 3), found),
    )

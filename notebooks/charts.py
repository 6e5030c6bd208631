"""What the practice API saw, drawn. `notebooks/matplotlibrc` has the style."""

import matplotlib.pyplot as plt
from IPython.display import display

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"  # told apart by colour-blind readers too
LIGHT_ORANGE = "#FBE3D0"  # an outage, or a time for which the API said to wait


def requests(requests, title: str, repos: list[str] | None = None, floor=None) -> None:
    """Draw when each request was under way, a row for each repository, as the practice API saw it.

    requests: a `FakeGitHub.requests`, or several of them by name, drawn on one time scale
    repos: the rows from top to bottom, also for repositories that were never asked
    floor: where to draw the shortest possible time, in seconds; by name for several
    """
    logs = requests if isinstance(requests, dict) else {"": requests}
    floors = floor if isinstance(floor, dict) else dict.fromkeys(logs, floor)
    rows = [repos or log["repository"].drop_duplicates().tolist() for log in logs.values()]
    row = 0.3 if sum(map(len, rows)) <= 16 else 0.22  # inches, so that all is seen at once
    heights = [0.6 + (row * len(names) if len(names) <= 12 else 3) for names in rows]
    longest = max((log["time"] + log["duration"]).max() for log in logs.values())
    figure, all_axes = plt.subplots(
        len(logs),
        sharex=True,
        squeeze=False,
        figsize=(8, 0.6 + sum(heights)),
        height_ratios=heights,
    )
    for axes, names, (name, log) in zip(all_axes[:, 0], rows, logs.items(), strict=True):
        y = log["repository"].map(names.index)
        end = log["time"] + log["duration"]
        failed = ~log["status"].between(200, 399)
        colors = failed.map({True: ORANGE, False: BLUE})
        axes.barh(y, log["duration"], left=log["time"], height=0.6, color=colors)
        following = log.groupby("repository")["time"].shift(-1)
        for bar in log.index[failed] if len(names) <= 12 else ():
            status = str(log["status"][bar] or "no answer")
            room = longest * (0.03 + 0.016 * len(status))
            label = {"va": "center", "fontsize": "small"}
            if log["duration"][bar] > room:
                middle = log["time"][bar] + log["duration"][bar] / 2
                axes.text(middle, y[bar], status, ha="center", color="white", **label)
            elif not following[bar] < end[bar] + room:  # of attempts close together, the last
                axes.text(end[bar], y[bar], f" {status}", color=ORANGE, **label)
        if floors.get(name):
            axes.axvline(floors[name], color="black", linestyle="--", linewidth=1)
            axes.text(floors[name], -0.6, " floor", va="bottom", fontsize="small")
        if len(names) <= 12:
            axes.set_yticks(range(len(names)), names)
        else:
            axes.set_yticks([])
            axes.set_ylabel(f"{len(names)} repositories")
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_title(name, loc="left", fontsize="medium", pad=16 if floors.get(name) else None)
    all_axes[-1, 0].set_xlabel("time (s)")
    all_axes[-1, 0].set_xlim(left=0)
    figure.suptitle(title, x=0.01, ha="left")
    counts = [f"{len(log)} requests {name}".strip() for name, log in logs.items()]
    show(figure, f"{title}. Over time, a row for each repository: {', '.join(counts)}.")


def allowance(
    requests, title: str, limit: int, slot_decay_per_second: float, api: tuple | None = None
) -> None:
    """Draw the requests so far against the most that a global concurrency limit lets through.

    That is `limit` at once, and `slot_decay_per_second` more a second. Refused requests (403, 429)
    are marked.

    requests: a `FakeGitHub.requests`, or two of them by name, the one to compare with first
    api: what the API answers, as (requests, seconds), to draw its first window
    """
    logs = requests if isinstance(requests, dict) else {"requests": requests}
    last = max([log["time"].max() for log in logs.values()] + [api[1] if api else 0])
    figure, axes = plt.subplots(figsize=(8, 3.5))
    refusals = 0
    for (name, log), color in zip(logs.items(), (GREY, BLUE)[-len(logs) :], strict=True):
        log = log.sort_values("time", ignore_index=True)
        count = log.index + 1
        axes.step(log["time"], count, where="post", color=color, label=name)
        refused = log["status"].isin([403, 429])
        if refused.any():
            refusals += refused.sum()
            times, order = log["time"][refused], count[refused]
            axes.plot(times, order, "x", color=ORANGE, ms=9, mew=2, label="refused by the API")
    axes.plot(
        [0, last],
        [limit, limit + slot_decay_per_second * last],
        color="black",
        linestyle="--",
        label=f"our limit: {limit} + {slot_decay_per_second:g} a second",
    )
    if api:
        answers, window = api
        label = f"the API: {answers} in {window} seconds"
        axes.hlines(answers, 0, window, color=GREY, linewidth=4, zorder=1, label=label)
    axes.set(xlabel="time (s)", ylabel="requests so far", ylim=(0, None), xlim=(0, None))
    axes.yaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower left", ncols=4, fontsize="small")
    figure.suptitle(title, x=0.01, ha="left")
    counts = [f"{len(log)} requests ({name})" for name, log in logs.items()]
    counts = counts if len(logs) > 1 else [f"{len(log)} requests"]
    text = f"{' and '.join(counts)} over time, and the line that the limit does not let them cross"
    show(figure, f"{title}. {text}; {refusals} were refused.")


def timelines(
    logs: dict[str, tuple], title: str, repos: dict[str, str], parts: tuple[str, str], wait: float
) -> None:
    """Draw two runs of each flow: when its requests were in flight, and how they ended.

    logs: by the flow's name two `FakeGitHub.requests`, of its first and of its second run
    repos: the rows of each run, from top to bottom, and what to write beside them
    parts: what the first and the second runs have in common
    wait: for how many seconds a refusal (403, 429) of the first run asks to wait
    """
    columns, rows = zip(*logs.values(), strict=True), list(repos)
    ends = [max((log["time"] + log["duration"]).max() for log in column) for column in columns]
    ends[0] = max(ends[0], *(refused(first) + wait for first, _ in logs.values()))
    figure, all_axes = plt.subplots(
        len(logs),
        2,
        sharex="col",
        sharey=True,
        figsize=(8, 1.2 + 1.25 * len(logs)),
        width_ratios=[max(end, 0.4 * max(ends)) for end in ends],
    )
    for row, (name, runs) in zip(all_axes, logs.items(), strict=True):
        for axes, log in zip(row, runs, strict=True):
            failed = ~log["status"].between(200, 399)
            y, colors = log["repository"].map(rows.index), failed.map({True: ORANGE, False: BLUE})
            axes.barh(y, log["duration"], left=log["time"], height=0.8, color=colors)
            end = log["time"] + log["duration"]
            retried = log.groupby("repository")["time"].shift(-1) < end + 0.1 * max(ends)
            for bar in log.index[failed & ~retried]:  # else the status would hide the retry
                status = f" {log['status'][bar]}"
                axes.text(end[bar], y[bar], status, color=ORANGE, va="center", size=8)
            plural = "request" if len(log) == 1 else "requests"
            axes.set_title(f"{len(log)} {plural}", loc="right", fontsize="small")
        if (start := refused(runs[0])) >= 0:
            row[0].axvspan(start, start + wait, color=LIGHT_ORANGE, zorder=0)
        row[0].set(yticks=range(len(rows)), ylim=(len(rows) - 0.5, -0.5))
        row[0].set_yticklabels(repos.values(), fontsize=8)
        row[0].tick_params(axis="y", length=0)
        row[0].set_title(name, loc="left", fontsize="medium")
    for axes, part, end in zip(all_axes[-1], parts, ends, strict=True):
        axes.set_xlabel(f"{part}: time (s)")
        axes.set_xlim(0, 1.08 * end)
    meaning = {
        "a request with a good response": BLUE,
        "a failed one": ORANGE,
        f"GitHub said to wait {wait} s": LIGHT_ORANGE,
    }
    patches = [plt.Rectangle((0, 0), 1, 1, color=color, label=of) for of, color in meaning.items()]
    figure.legend(handles=patches, loc="outside lower left", ncols=3, fontsize="small")
    figure.suptitle(f"{title} (a row is a repository)", x=0.01, ha="left")
    counts = [f"{name} {len(first)}, then {len(then)}" for name, (first, then) in logs.items()]
    show(figure, f"{title}. Requests over time, a row for each repository: {'; '.join(counts)}.")


def refused(log) -> float:
    """When the first response that refused a request had arrived; -1 if there was none."""
    refusals = log[log["status"].isin([403, 429])]
    return (refusals["time"] + refusals["duration"]).min() if len(refusals) else -1.0


def slots(seen: list[tuple[float, int]], title: str) -> None:
    """Draw how many slots of a limit were free, as `lesson.watch_slots` saw them."""
    times, free = map(list, zip(*seen, strict=True))
    first = next((t for t, n in seen if n < max(free)), 0)  # when a slot was first taken
    times = [t - first for t in times]
    figure, axes = plt.subplots(figsize=(8, 2.8))
    axes.fill_between(times, max(free), step="post", color="#e6e6e6", label="taken")
    axes.fill_between(times, free, step="post", color=BLUE, label="free")
    axes.hlines(range(1, max(free)), -1, times[-1], color="white", linewidth=2)  # one on another
    axes.set(xlabel="time (s)", ylabel="slots", ylim=(0, max(free)), xlim=(-0.5, times[-1]))
    axes.yaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower left", ncols=2, fontsize="small")
    figure.suptitle(title, x=0.01, ha="left")
    text = f"Of {max(free)} slots, {min(free)} free at the fewest and {free[-1]} at the end"
    show(figure, f"{title}. {text}, over {times[-1]:.0f} seconds.")


def stars(stars: dict[str, int], title: str) -> None:
    """Draw a bar for each repository, the one with the most stars on top."""
    names = sorted(stars, key=stars.get)
    counts = [stars[name] for name in names]
    shades = plt.get_cmap("viridis_r")([0.1 + 0.75 * n / len(names) for n in range(len(names))])
    figure, axes = plt.subplots(figsize=(8, 0.8 + 0.26 * len(names)))
    bars = axes.barh(names, counts, height=0.75, color=shades)
    axes.bar_label(bars, fmt="{:,.0f}", padding=5, fontsize="small")
    axes.margins(x=0.1, y=0.01)
    axes.tick_params(length=0, labelsize="small")
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left")
    most, fewest = f"{names[-1]} has {counts[-1]:,}", f"{names[0]} {counts[0]:,}"
    show(figure, f"{title}. A bar for each of {len(names)} repositories: {most}, {fewest}.")


def task_stream(stream: list[dict], title: str) -> None:
    """Draw which of Dask's workers did what, and when: a row for each of their threads.

    stream: what `lesson.task_stream` recorded
    """
    rows = sorted({(entry["worker"], entry["thread"]) for entry in stream})
    workers = sorted({worker for worker, _ in rows})
    tasks = list(dict.fromkeys(entry["key"].rpartition("-")[0] for entry in stream))
    spans = [(step["start"], step["stop"]) for entry in stream for step in entry["startstops"]]
    begin = min(start for start, _ in spans)
    figure, axes = plt.subplots(figsize=(8, 1 + 0.35 * len(rows)))
    for task, color in zip(tasks, (BLUE, GREY, ORANGE), strict=False):
        done = [entry for entry in stream if entry["key"].startswith(f"{task}-")]
        steps = [(entry, step) for entry in done for step in entry["startstops"]]
        axes.barh(
            [rows.index((entry["worker"], entry["thread"])) for entry, _ in steps],
            [step["stop"] - step["start"] for _, step in steps],
            left=[step["start"] - begin for _, step in steps],
            height=0.6,
            color=color,
            edgecolor="white",
            label=task,
        )
    names = [f"worker {workers.index(worker) + 1}" for worker, _ in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.set(xlabel="time (s)", ylim=(len(rows) - 0.5, -0.5), xlim=(0, None))
    for row in range(1, len(rows)):
        if names[row] != names[row - 1]:
            axes.axhline(row - 0.5, color="black", linewidth=1)
    figure.legend(loc="outside lower left", ncols=3, fontsize="small")
    figure.suptitle(title, x=0.01, ha="left")
    text = f"{len(stream)} task runs in {len(rows)} threads of {len(workers)} worker processes"
    show(figure, f"{title}. Over time, a row for each thread: {text}.")


def show(figure, alt: str) -> None:
    """Show a figure once, with a text for those who do not see it (in HTML made by nbconvert)."""
    display(figure, metadata={"image/png": {"alt": alt}})
    plt.close(figure)

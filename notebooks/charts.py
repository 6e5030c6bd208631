"""What the practice API saw, drawn. `notebooks/matplotlibrc` has the style."""

from datetime import date

import matplotlib.pyplot as plt
from IPython.display import display
from matplotlib.dates import DateFormatter

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"  # told apart by colour-blind readers too
LIGHT_ORANGE = "#FBE3D0"  # an outage, or a time for which the API said to wait


def requests(
    requests, title: str, repos: list[str] | None = None, floor=None, band: tuple | None = None
) -> None:
    """Draw when each request was in flight, a row for each repository, as the practice API saw it.

    requests: a `FakeGitHub.requests`, or several of them by name, drawn on one time scale
    repos: the rows from top to bottom, also for repositories that were never requested
    floor: where to draw the shortest possible time, in seconds; by name for several
    band: an outage, or a time to wait, as (from, to, what it is), in seconds
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
            status = str(log["status"][bar] or "no response")
            room = longest * (0.03 + 0.016 * len(status))
            label = {"va": "center", "fontsize": "small"}
            if log["duration"][bar] > room:
                middle = log["time"][bar] + log["duration"][bar] / 2
                axes.text(middle, y[bar], status, ha="center", color="white", **label)
            elif not following[bar] < end[bar] + room:  # of attempts close together, the last
                axes.text(end[bar], y[bar], f" {status}", color=ORANGE, **label)
        if band:
            axes.axvspan(*band[:2], color=LIGHT_ORANGE, zorder=0)
            middle = sum(band[:2]) / 2, 1
            where = {"xycoords": axes.get_xaxis_transform(), "va": "bottom", "ha": "center"}
            axes.annotate(band[2], middle, color=ORANGE, fontsize="small", **where)
        if floors.get(name):
            axes.axvline(floors[name], color="black", linestyle=":", linewidth=1.5)
            axes.text(floors[name], -0.6, " floor", va="bottom", fontsize="small")
        if len(names) <= 12:
            axes.set_yticks(range(len(names)), names)
        else:
            axes.set_yticks([])
            axes.set_ylabel(f"{len(names)} repositories, a row each")
        axes.set_ylim(len(names) - 0.5, -0.5)
        pad = 16 if band or floors.get(name) else None
        axes.set_title(name, loc="left", fontsize="medium", pad=pad)
        total = f"{len(log)} request{'s'[: len(log) != 1]}, {end.max():.1f} s"
        axes.set_title(total, loc="right", fontsize="medium", pad=pad)
    all_axes[-1, 0].set_xlabel("time (s)")
    all_axes[-1, 0].set_xlim(left=0)
    figure.suptitle(title, x=0.01, ha="left")
    counts = [f"{len(log)} requests {name}".strip() for name, log in logs.items()]
    show(figure, f"{title}. Over time, a row for each repository: {', '.join(counts)}.")


def allowance(
    requests, title: str, limit: int, slot_decay_per_second: float, api: tuple | None = None
) -> None:
    """Draw the requests so far, from the first one on, and the most that a limit lets through.

    That is `limit` at once, and `slot_decay_per_second` more a second: the dashed line.

    requests: a `FakeGitHub.requests`, or those of two processes by name, counted together
    api: what the API allows, as (requests, seconds), to draw its first window
    """
    logs = requests if isinstance(requests, dict) else {"": requests}
    first = min(log["time"].min() for log in logs.values())
    times = sorted(time - first for log in logs.values() for time in log["time"])
    end, refused = max(times[-1], api[1] if api else 0), 0
    figure, axes = plt.subplots(figsize=(8, 3.8))
    axes.step(times, range(1, len(times) + 1), where="post", color=GREY, linewidth=1)
    for (name, log), filled in zip(logs.items(), (True, False), strict=False):
        good = log["status"].between(200, 399)
        refused += len(log) - good.sum()
        for rows, color, kind in (good, BLUE, "good response"), (~good, ORANGE, "refused"):
            x = [time - first for time in log["time"][rows]]
            y = [times.index(time) + 1 for time in x]
            label = f"{name}: {kind}".removeprefix(": ") if x else None
            face = color if filled else "white"
            axes.plot(x, y, "o", color=color, mfc=face, mew=1.5, label=label)
    label = f"our limit: {limit} + {slot_decay_per_second:g} a second"
    most = [limit, limit + slot_decay_per_second * end]
    axes.plot([0, end], most, color="black", linestyle="--", label=label)
    if api:
        label = f"the API allows {api[0]} in {api[1]} seconds"
        axes.hlines(api[0], 0, api[1], color="black", linewidth=1, label=label)
    axes.set(xlabel="seconds since the first request", ylabel="requests so far")
    axes.set(ylim=(0, 1.05 * max(most[1], len(times))), xlim=(-0.02 * end, 1.02 * end))
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_title(f"{len(times)} requests, {times[-1]:.1f} s", loc="right", fontsize="medium")
    figure.legend(loc="outside lower left", ncols=2, fontsize="small")
    figure.suptitle(title, x=0.01, ha="left")
    counts = [f"{len(log)} requests {name}".strip() for name, log in logs.items()]
    text = f"{' and '.join(counts)} over time, and the line that the limit does not let them cross"
    show(figure, f"{title}. {text}; {refused} were refused.")


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
        for axes in row:
            axes.tick_params(axis="y", length=0)
        row[0].set_title(name, loc="left", fontsize="medium")
    for axes, part, end in zip(all_axes[-1], parts, ends, strict=True):
        axes.set_xlabel(f"{part}: time (s)")
        axes.set_xlim(0, 1.05 * end + 0.05 * max(ends))  # room for the last status
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
    full, start = max(free), next((t for t, n in seen if n < max(free)), 0)
    times = [time - start for time in times]  # since a slot was first taken
    empty = [time for time, count in zip(times, free, strict=True) if count == 0] or [0]
    figure, axes = plt.subplots(figsize=(8, 2.8))
    axes.axhline(full, color="black", linestyle="--", linewidth=1)
    axes.step([min(-1, times[0]), *times], [full, *free], where="post", color="black", linewidth=2)
    words = {"full": -0.5, "empty": empty[-1] / 2, "refills": (empty[-1] + times[-1]) / 2}
    for word, x in words.items():
        axes.text(x, 1.04 * full, word, ha="center", va="bottom")
    axes.set_title(f"dashed: the limit, {full} slots", loc="right", fontsize="medium")
    axes.set(xlabel="seconds since a slot was first taken", ylabel="free slots")
    axes.set(ylim=(0, 1.2 * full), xlim=(-1, times[-1]))
    axes.yaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title, x=0.01, ha="left")
    text = f"Of {full} slots, {min(free)} free at the fewest and {free[-1]} at the end"
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


def task_stream(
    stream: list[dict], requests, title: str, limit: int, slot_decay_per_second: float
) -> None:
    """Draw what Dask's threads did, a row each, and below it the requests so far under their limit.

    stream: what `lesson.task_stream` recorded: task runs that each end with their one request
    requests: a `FakeGitHub.requests`
    limit, slot_decay_per_second: those of the global concurrency limit
    """
    threads = sorted({(entry["worker"], entry["thread"]) for entry in stream})
    workers = {}
    for worker, thread in threads:
        workers.setdefault(worker, []).append(thread)
    names = {
        (worker, thread): f"worker {number}, thread {within}"
        for number, (worker, its_threads) in enumerate(workers.items(), 1)
        for within, thread in enumerate(its_threads, 1)
    }
    runs = sorted((entry["startstops"][0] | entry for entry in stream), key=lambda r: r["stop"])
    log = requests.assign(end=requests["time"] + requests["duration"]).sort_values("end")
    pairs = list(zip(runs, log.itertuples(), strict=True))
    shift = min(
        run["stop"] - request.end for run, request in pairs
    )  # from the API's clock to Dask's
    begin = min(run["start"] for run in runs)
    first = shift - begin  # request, in seconds since then
    figure, (above, below) = plt.subplots(2, sharex=True, figsize=(8, 4.5))
    for run, request in pairs:
        row = list(names).index((run["worker"], run["thread"]))
        start, sent = run["start"] - begin, first + request.time
        above.barh(row, sent - start, left=start, height=0.6, color="#d0d0d0")
        above.barh(row, request.duration, left=sent, height=0.6, color=BLUE)
    above.barh(row, 0, color="#d0d0d0", label="waiting for a slot")
    above.barh(row, 0, color=BLUE, label="request")
    above.set_yticks(range(len(names)), list(names.values()))
    above.set_ylim(len(names) - 0.5, -0.5)
    times, last = first + requests["time"], requests["time"].max()
    count = [*range(1, len(times) + 1), len(times)]
    below.step([*times, first + last], count, where="post", color=BLUE, label="requests so far")
    line = f"our limit: {limit} + {slot_decay_per_second:g} a second"
    most = [limit, limit + slot_decay_per_second * last]
    below.plot([first, first + last], most, color="black", linestyle="--", label=line)
    below.set(xlabel="time (s)", ylabel="requests so far", ylim=(0, None), xlim=(0, None))
    below.yaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower left", ncols=4, fontsize="small")
    figure.suptitle(title, x=0.01, ha="left")
    text = f"{len(stream)} task runs in {len(names)} threads of {len(workers)}"
    text += " worker processes wait for slots and send their requests, which stay below the limit"
    show(figure, f"{title}. Over time, a row for each thread: {text}.")


def runs(logs: dict[str, tuple], title: str, repos: list[str]) -> None:
    """Draw runs beside each other: when each request was in flight, a row for each repository.

    logs: by name the `FakeGitHub.requests` of a first run, a second run …
    repos: the rows from top to bottom
    """
    columns, last = max(map(len, logs.values())), 0
    size = 8, 0.8 + (0.6 + 0.3 * len(repos)) * len(logs)
    figure, all_axes = plt.subplots(
        len(logs), columns, sharex=True, sharey=True, squeeze=False, figsize=size
    )
    for row, (name, several) in zip(all_axes, logs.items(), strict=True):
        for axes, (number, log) in zip(row, enumerate(several, 1), strict=True):
            colors = log["status"].between(200, 399).map({True: BLUE, False: ORANGE})
            y = log["repository"].map(repos.index)
            axes.barh(y, log["duration"], left=log["time"], height=0.6, color=colors)
            last = max([last, *(log["time"] + log["duration"])])
            text = f"{len(log)} requests" if len(log) > 1 else ("no request", "1 request")[len(log)]
            axes.set_title(f"run {number}: {text}", loc="left", fontsize="medium")
            axes.set_yticks(range(len(repos)), repos)
            axes.set_ylim(len(repos) - 0.5, -0.5)
        above_the_names = {"xycoords": "axes fraction", "ha": "right", "va": "baseline"}
        row[0].annotate(f"{name}  ", (0, 1.06), fontweight="bold", **above_the_names)
    for axes in all_axes[-1]:
        axes.set(xlabel="time (s)", xlim=(0, 1.1 * last))
    figure.suptitle(title, x=0.01, ha="left")
    counts = [f"{name} {', then '.join(str(len(log)) for log in of)}" for name, of in logs.items()]
    show(figure, f"{title}. Requests over time, a row for each repository: {'; '.join(counts)}.")


def history(history, title: str) -> None:
    """Draw how many stars each repository has gained since its first day, a dot for each day.

    history: a DataFrame with a date, a repository and its stars in each row
    """
    days, told = sorted(set(history["date"])), []
    figure, axes = plt.subplots(figsize=(8, 3))
    axes.set_prop_cycle(color=[BLUE, ORANGE, GREY])
    for repo, rows in history.sort_values("date").groupby("repository"):
        x, gained = rows["date"].map(date.fromisoformat), rows["stars"] - rows["stars"].iloc[0]
        [line] = axes.plot(x, gained, marker="o")
        text = f"  {repo}: {rows['stars'].iloc[-1]:,} (+{gained.iloc[-1]:,})"
        label = {"color": line.get_color(), "va": "center", "fontsize": "small"}
        axes.text(x.iloc[-1], gained.iloc[-1], text, **label)
        told.append(text.strip())
    axes.xaxis.set_major_formatter(DateFormatter("%a %d"))
    since = date.fromisoformat(days[0])
    axes.set(ylabel=f"stars gained since {since:%a %d}", ylim=(0, None))
    figure.suptitle(title, x=0.01, ha="left")
    show(figure, f"{title}. Stars gained, by {len(days)} days: {'; '.join(told)}.")


def interrupted(runs: dict[str, tuple], title: str, repos: list[str], after: float) -> None:
    """Draw interrupted runs under each other: how long each repository's task waited for a slot.

    runs: by name the `FakeGitHub.requests`, and the seconds for which the run went on after ■
    repos: the rows from top to bottom, in the order of their requests where there is one
    after: when ■ was pressed, in seconds since the first request
    """
    size = 8, 0.8 + (0.7 + 0.24 * len(repos)) * len(runs)
    figure, all_axes = plt.subplots(len(runs), sharex=True, squeeze=False, figsize=size)
    told = []
    for axes, (name, (log, seconds)) in zip(all_axes[:, 0], runs.items(), strict=True):
        end, sent = after + seconds, dict(zip(log["repository"], log["time"], strict=True))
        rows = [*sent, *(repo for repo in repos if repo not in sent)]
        waits = [sent.get(repo, end) for repo in rows]
        axes.barh(rows, waits, height=0.6, color=GREY, label="waits for a slot")
        axes.barh(
            [*sent], log["duration"], left=log["time"], height=0.6, color=BLUE, label="request"
        )
        axes.axvline(after, color="black", linewidth=1.5)
        more = sum(time > after for time in sent.values())
        text = f"went on for {seconds:.0f} s, {more} more request{'s'[: more != 1]}"
        axes.set_title(text, loc="right", fontsize="medium")
        axes.set_title(name, loc="left", fontsize="medium")
        axes.text(after, 0, "  ■ pressed", va="center")
        axes.set_ylim(len(rows) - 0.5, -0.5)
        told.append(f"{name}: {text}")
    all_axes[-1, 0].set(xlabel="time (s)", xlim=(0, None))
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower left", ncols=2, fontsize="small"
    )
    figure.suptitle(title, x=0.01, ha="left")
    show(figure, f"{title}. {'; '.join(told)}.")


def show(figure, alt: str) -> None:
    """Show a figure once, with a text for those who do not see it (in HTML made by nbconvert)."""
    display(figure, metadata={"image/png": {"alt": alt}})
    plt.close(figure)

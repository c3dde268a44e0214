"""Tables and plots of the study in context_extension.py, from results/context_extension.json.

python -m benchmarks.context_extension_report      # writes them again
"""

import itertools
import json
import math
import statistics
from pathlib import Path

import matplotlib.figure
import numpy as np
import scipy.stats
from matplotlib import ticker

from benchmarks.clock import ratios
from rope_jax.plot import COLOURS, DASHES

NAMES = {
    "rope": "RoPE",
    "sinusoidal": "sinusoidal",
    "learned": "learned",
    "t5": "T5 bias",
    "alibi": "ALiBi",
    "none": "none (NoPE)",
    "none again": "none again, to compare",
    "unmodified": "unmodified",
    "linear": "position interpolation",
    "ntk": "NTK-aware",
    "dynamic": "dynamic NTK",
    "yarn": "YaRN",
    "longrope": "LongRoPE",
    "llama3": "Llama 3's rule",
}


SPREAD = "band: 95 % interval, bar: all seeds"


def interval(values) -> tuple[float, float] | None:
    """The mean over seeds, and half the width of its 95 % interval (Student's t; NaN of a single seed)."""
    if any(value is None for value in values):
        return None
    if len(values) == 1:
        return values[0], math.nan
    wide = scipy.stats.t.ppf(0.975, len(values) - 1) / math.sqrt(len(values))
    return statistics.fmean(values), wide * statistics.stdev(values)


def octaves(config: dict) -> list[tuple[int, int]]:
    """L/2 to L, L to 2L, and so on up to the longest."""
    length = config["length"]
    return list(itertools.pairwise([length // 2, *(length << i for i in range(config["factor"].bit_length()))]))


def octave_means(readings: list[dict], key: str, config: dict) -> list[list]:
    """By octave and seed, the mean bits per byte between two positions; None beyond what a model can read."""

    def mean(curve, low, high):
        part = curve[low // config["span"] : high // config["span"]]
        return statistics.fmean(part) if len(part) == (high - low) // config["span"] else None

    return [[mean(each[key], *ends) for each in readings] for ends in octaves(config)]


def by_octave(readings: list[dict], key: str, config: dict) -> list:
    """Their intervals over the seeds."""
    return [interval(means) for means in octave_means(readings, key, config)]


def asked(config: dict) -> list[str]:
    """Distances and windows of the questions: one within the training length, the others in the longest window."""
    lengths = [high for _, high in octaves(config)]
    return [f"{3 * lengths[0] // 4} in {lengths[0]}", *(f"{3 * each // 4} in {lengths[-1]}" for each in lengths)]


def shares(readings: list[dict], question: str) -> list[float] | None:
    """The share of passkeys found, seed by seed; None where the model has no such window."""
    found = [each["passkey"].get(question) for each in readings]
    return None if None in found else found


def said(value) -> str:
    if value is None:
        return "-"
    mean, half = value
    return f"{mean:.2f}" if math.isnan(half) else f"{mean:.2f} ± {half:.2f}"


def share_said(found: list[float] | None) -> str:
    """The mean and, of several seeds, the range: shares near 0 or 1 have no interval worth its name."""
    if found is None:
        return "-"
    mean = f"{statistics.fmean(found):.2f}"
    return mean if min(found) == max(found) else f"{mean} ({min(found):.2f} to {max(found):.2f})"


def table(titles, rows) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (titles, ["---"] * len(titles), *rows)]


def reading_table(kind: str, rows: dict, config: dict) -> list[str]:
    spans = [f"{low} to {high}" for low, high in octaves(config)]
    cells = [
        [
            NAMES[name],
            *map(said, by_octave(each, "long", config)),
            *(share_said(shares(each, question)) for question in asked(config)),
        ]
        for name, each in rows.items()
    ]
    return table([kind, *spans, *(f"passkey at {question}" for question in asked(config))], cells)


def method_table(rows: dict, sliding: list[dict], config: dict) -> list[str]:
    """As for the encodings, beside the same model in windows that slide, and how far behind that each ends."""
    titles, rule, *lines = reading_table("method", rows, config)
    *_, (low, high) = octaves(config)
    *_, least = octave_means(sliding, "sliding", config)
    behind = [
        interval([a - b for a, b in zip(octave_means(each, "long", config)[-1], least, strict=True)])
        for each in rows.values()
    ]
    ends = [f"{titles} {low} to {high}, less sliding |", f"{rule} --- |"]
    ends += [f"{line} {said(value)} |" for line, value in zip(lines, behind, strict=True)]
    slid = ["unmodified, sliding", *map(said, by_octave(sliding, "sliding", config)), *["-"] * len(asked(config))]
    return [*ends, f"| {' | '.join([*slid, said((0.0, math.nan))])} |"]


def tables(kept: dict) -> str:
    """The results as Markdown: bits per byte with 95 % intervals over the seeds, passkeys with their range."""
    config = kept["config"]
    length, factor = config["length"], config["factor"]
    lines = [
        f"`{kept['command']}`: {kept['device']}, {kept['processor']}; Python {kept['python']}, jax {kept['jax']}, "
        f"{kept['date']}. Means of {config['seeds']} seeds; ± is a 95 % interval of the mean (Student's t), "
        "(to) the least and the most.",
        "",
        f"Bits per byte at positions of one long window, trained at {length}; and the share of passkeys found, by "
        "the bytes between key and question and the window that the question ends",
        "",
        *reading_table("encoding", kept["encodings"], config),
        "",
        f"Bits per byte at the same positions, windows of {length} that slide by {length // 2}",
        "",
    ]
    sliding = [[NAMES[e], *map(said, by_octave(each, "sliding", config))] for e, each in kept["encodings"].items()]
    lines += table(["encoding", *(f"{low} to {high}" for low, high in octaves(config))], sliding)
    for encoding, tried in kept["rates tried"].items():
        costs = ", ".join(f"{cost:.2f} at {float(rate):g} times" for rate, cost in tried.items())
        lines += [
            "",
            f"Learning rate of the table of {NAMES[encoding]}, chosen on training text: bits per byte {costs} that "
            "of the rest.",
        ]
    lines += ["", "Everything else, the learning rate of the rest too, is for all encodings what suits RoPE."]
    for key, title in (("plain", "as it is"), ("tuned", f"after {config['tune_steps']} steps at that length")):
        rows = {method: each[key] for method, each in kept["methods"].items()}
        lines += ["", f"RoPE extended to {factor} times its length, {title}", ""]
        lines += method_table(rows, kept["encodings"]["rope"], config)
    lines += [
        "",
        "LongRoPE's divisors were searched on training text of the longest length; the other methods have what "
        "their papers say. NTK-aware and dynamic NTK are one at that length, where both are fine-tuned.",
    ]
    speed = kept["speed"]
    jobs = speed["milliseconds"]
    lines += [
        "",
        "Times over those of the model without positions: medians (quartiles) of rounds in turn; "
        f"{speed['device']}, {speed['processor']}, jax {speed['jax']}, {speed['date']}",
        "",
    ]
    cells = [
        [
            NAMES[e],
            *(f"{m:.2f} ({a:.2f} to {b:.2f})" for a, m, b in (ratios(job, e, "none") for job in jobs.values())),
        ]
        for e in jobs[next(iter(jobs))]
    ]
    lines += table(["encoding", *jobs], cells)
    alone = [f"{job}: {statistics.median(times['none']):.2f} ms" for job, times in jobs.items()]
    lines += ["", f"The model without positions itself: {'; '.join(alone)}."]
    return "\n".join(lines) + "\n"


def short_table(kept: dict) -> str:
    """The encodings: the first and the last octaves, passkeys, and the times."""
    config = kept["config"]
    spans = octaves(config)
    chosen = [0, 1, len(spans) - 1]
    near, *_, far = asked(config)
    jobs = kept["speed"]["milliseconds"]
    short_step, long_step, token, _ = jobs
    titles = [f"bits/byte, {low} to {high}" for low, high in (spans[i] for i in chosen)]
    titles += [f"sliding, {spans[-1][0]} to {spans[-1][1]}", f"passkey at {near}", f"passkey at {far}"]
    titles += [short_step, long_step, "cached token"]
    rows = []
    for encoding, readings in kept["encodings"].items():
        long = by_octave(readings, "long", config)
        values = [*(long[i] for i in chosen), by_octave(readings, "sliding", config)[-1]]
        found = [share_said(shares(readings, question)) for question in (near, far)]
        times = [f"{ratios(jobs[job], encoding, 'none')[1]:.2f}" for job in (short_step, long_step, token)]
        rows.append([NAMES[encoding], *map(said, values), *found, *times])
    return "\n".join(table(["encoding", *titles], rows))


# ------------------------------------------------------------------------------------------- the pictures


def styles(rows: dict) -> dict:
    """A colour, dashes and a marker for each row; what nothing was done to is black."""
    plain = [name for name in rows if name in ("none", "unmodified")]
    others = [name for name in rows if name not in plain]
    ways = zip([*others, *plain], (*COLOURS[: len(others)], COLOURS[-1]), DASHES, "osD^vXP", strict=False)
    return {name: dict(color=colour, linestyle=dashes, marker=marker) for name, colour, dashes, marker in ways}


def draw_curves(axes, rows: dict, key: str, config: dict) -> None:
    """Bits per byte by position, a line for each row with its interval, and where the training ended."""
    for name, readings in rows.items():
        points = [interval(values) for values in zip(*(each[key] for each in readings), strict=True)]
        mean, half = np.array(points).T
        half = np.nan_to_num(half)  # of a single seed
        middle = config["span"] * (np.arange(len(mean)) + 0.5)
        style = styles(rows)[name]
        axes.plot(middle, mean, **style, markevery=0.25, markersize=4, label=NAMES[name], linewidth=1.6)
        axes.fill_between(middle, mean - half, mean + half, color=style["color"], alpha=0.15, linewidth=0)
    axes.set(xlabel="position in the text (bytes)", ylabel="bits per byte")


def draw_passkeys(axes, rows: dict, config: dict) -> None:
    """Shares by distance in the longest window: a line through the means, a bar from the least to the most."""
    _, *questions = asked(config)
    distances = np.array([int(question.split()[0]) for question in questions])
    for i, (name, readings) in enumerate(rows.items()):
        found = [shares(readings, question) for question in questions]
        if None in found:
            continue
        beside = distances * 2 ** (0.03 * (i - len(rows) / 2))  # so that bars do not hide each other
        mean = np.mean(found, axis=1)
        ends = [mean - np.min(found, axis=1), np.max(found, axis=1) - mean]
        axes.errorbar(beside, mean, yerr=ends, **styles(rows)[name], markersize=5, elinewidth=1, label=NAMES[name])
    axes.set(xlabel="bytes between key and question", ylabel="passkeys found (share)", ylim=(-0.04, 1.04))


def finish(figure, config: dict) -> matplotlib.figure.Figure:
    for axes in figure.axes:
        axes.axvline(config["length"], color="0.4", linestyle=":", linewidth=1.2)
        axes.set_xscale("log", base=2)
        axes.xaxis.set(major_formatter=ticker.FormatStrFormatter("%d"))
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = len(labels) if len(labels) < 7 else 4
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def draw_encodings(kept: dict) -> matplotlib.figure.Figure:
    config, encodings = kept["config"], kept["encodings"]
    longest = config["length"] * config["factor"]
    figure = matplotlib.figure.Figure(figsize=(12, 4.4), layout="constrained")
    long, sliding, passkeys = figure.subplots(1, 3)
    draw_curves(long, encodings, "long", config)
    long.set_title("bits per byte, one long window")
    draw_curves(sliding, encodings, "sliding", config)
    sliding.set_title("bits per byte, windows that slide")
    draw_passkeys(passkeys, encodings, config)
    passkeys.set_title(f"passkeys, windows of {longest:,}")
    figure.suptitle(f"Trained at {config['length']} bytes (dotted), read at up to {longest:,}; {SPREAD}")
    return finish(figure, config)


def draw_methods(kept: dict) -> matplotlib.figure.Figure:
    config, readings = kept["config"], kept["encodings"]["rope"]
    longest = config["length"] * config["factor"]
    figure = matplotlib.figure.Figure(figsize=(12, 7.6), layout="constrained")
    titles = ("as it is", f"after {config['tune_steps']} steps at {longest:,}")
    for (left, right), key, title in zip(
        figure.subplots(2, 2, sharey="col"), ("plain", "tuned"), titles, strict=True
    ):
        rows = {method: each[key] for method, each in kept["methods"].items()}
        slid = np.mean([each["sliding"] for each in readings], axis=0)
        middle = config["span"] * (np.arange(len(slid)) + 0.5)
        left.plot(middle, slid, color="0.75", linewidth=5, label="unmodified, sliding")
        draw_curves(left, rows, "long", config)
        draw_passkeys(right, rows, config)
        left.set_title(f"bits per byte, {title}")
        right.set_title(f"passkeys in windows of {longest:,}, {title}")
    figure.suptitle(f"RoPE trained at {config['length']} bytes (dotted), extended to {longest:,}; {SPREAD}")
    return finish(figure, config)


def report(kept: dict, folder: Path) -> str:
    """Writes the tables and the two pictures beside the numbers, and returns the tables."""
    text = tables(kept)
    (folder / "context_extension.md").write_text(text)
    draw_encodings(kept).savefig(folder / "context_extension_encodings.png", dpi=100)
    draw_methods(kept).savefig(folder / "context_extension_methods.png", dpi=100)
    return text


if __name__ == "__main__":
    results = Path(__file__).parent / "results"
    print(report(json.loads((results / "context_extension.json").read_text()), results))

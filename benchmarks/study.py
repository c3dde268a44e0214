"""What did configs/context_extension.py find, over its seeds?

python benchmarks/study.py      # makes the tables and the plots again, from results/context_extension.json
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

NAMES = {
    "rope": "RoPE",
    "sinusoidal": "sinusoidal",
    "learned": "learned",
    "t5": "T5 bias",
    "alibi": "ALiBi",
    "none": "none (NoPE)",
    "unmodified": "unmodified",
    "linear": "position interpolation",
    "ntk": "NTK-aware",
    "dynamic": "dynamic NTK",
    "yarn": "YaRN",
    "longrope": "LongRoPE",
    "llama3": "Llama 3 rule",
}
# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")


def interval(values) -> tuple[float, float] | None:
    """The mean over seeds, and half the width of its 95 % interval (Student's t; NaN of a single seed)."""
    if any(value is None for value in values):
        return None
    wide = scipy.stats.t.ppf(0.975, len(values) - 1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), wide * (statistics.stdev(values) if len(values) > 1 else 1.0)


def octaves(config: dict) -> list[tuple[int, int]]:
    """L/2 to L, L to 2L, and so on up to the longest."""
    length = config["length"]
    return list(itertools.pairwise([length // 2, *(length << i for i in range(config["factor"].bit_length()))]))


def by_octave(readings: list[dict], key: str, config: dict) -> list:
    """Intervals of the mean bits per byte between two positions; None beyond what a model can read."""

    def mean(curve, low, high):
        part = curve[low // config["span"] : high // config["span"]]
        return statistics.fmean(part) if len(part) == (high - low) // config["span"] else None

    return [interval([mean(each[key], *ends) for each in readings]) for ends in octaves(config)]


def by_distance(readings: list[dict], config: dict) -> dict:
    """Intervals of the share of passkeys found, by the distance to them."""
    asked = [str(3 * high // 4) for _, high in octaves(config)]
    return {int(d): interval([each["passkey"].get(d) for each in readings]) for d in asked}


def ratios(times: dict, encoding: str) -> list[float]:
    """Quartiles of the time over that of the model without positions in the same round."""
    return statistics.quantiles([a / b for a, b in zip(times[encoding], times["none"], strict=True)], n=4)


def said(value) -> str:
    if value is None:
        return "-"
    mean, half = value
    return f"{mean:.2f}" if math.isnan(half) else f"{mean:.2f} ± {half:.2f}"


def table(titles, rows) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (titles, ["---"] * len(titles), *rows)]


def reading_table(kind: str, rows: dict, config: dict) -> list[str]:
    spans = [f"{low} to {high}" for low, high in octaves(config)]
    asked = [f"passkey at {3 * high // 4}" for _, high in octaves(config)]
    cells = [
        [NAMES[name], *map(said, [*by_octave(each, "long", config), *by_distance(each, config).values()])]
        for name, each in rows.items()
    ]
    return table([kind, *spans, *asked], cells)


def tables(kept: dict) -> str:
    """The results as Markdown: means, and 95 % intervals over the seeds."""
    config = kept["config"]
    length, factor = config["length"], config["factor"]
    lines = [
        f"`{kept['command']}`: {kept['device']}, {kept['processor']}; Python {kept['python']}, jax {kept['jax']}, "
        f"{kept['date']}.",
        "",
        f"Bits per byte at positions of one long window, trained at {length}; and passkeys found",
        "",
        *reading_table("encoding", kept["encodings"], config),
        "",
        f"Bits per byte at the same positions, windows of {length} that slide by {length // 2}",
        "",
    ]
    sliding = [[NAMES[e], *map(said, by_octave(each, "sliding", config))] for e, each in kept["encodings"].items()]
    lines += table(["encoding", *(f"{low} to {high}" for low, high in octaves(config))], sliding)
    for key, title in (("plain", "as it is"), ("tuned", f"after {config['tune_steps']} steps at that length")):
        rows = {method: each[key] for method, each in kept["methods"].items()}
        lines += ["", f"RoPE extended to {factor} times its length, {title}", ""]
        lines += reading_table("method", rows, config)
    lines += ["", "Times over those of the model without positions: medians (quartiles) of rounds in turn", ""]
    cells = [
        [
            NAMES[e],
            *(f"{m:.2f} ({a:.2f} to {b:.2f})" for a, m, b in (ratios(job, e) for job in kept["speed"].values())),
        ]
        for e in kept["encodings"]
    ]
    lines += table(["encoding", *kept["speed"]], cells)
    alone = [f"{job}: {statistics.median(times['none']):.2f} ms" for job, times in kept["speed"].items()]
    lines += ["", f"The model without positions itself: {'; '.join(alone)}."]
    return "\n".join(lines) + "\n"


def short_table(kept: dict) -> str:
    """What the README shows of the encodings: the first and the last octaves, and the times."""
    config = kept["config"]
    spans = octaves(config)
    chosen = [0, 1, len(spans) - 1]
    near, far = (3 * spans[i][1] // 4 for i in (0, 1))
    short_step, _, token, _ = kept["speed"]
    titles = [f"bits/byte, {low} to {high}" for low, high in (spans[i] for i in chosen)]
    titles += [f"sliding, {spans[-1][0]} to {spans[-1][1]}", f"passkey at {near}", f"at {far}"]
    rows = []
    for encoding, readings in kept["encodings"].items():
        long, found = by_octave(readings, "long", config), by_distance(readings, config)
        values = [*(long[i] for i in chosen), by_octave(readings, "sliding", config)[-1], found[near], found[far]]
        times = [f"{ratios(kept['speed'][job], encoding)[1]:.2f}" for job in (short_step, token)]
        rows.append([NAMES[encoding], *map(said, values), *times])
    return "\n".join(table(["encoding", *titles, "training step", "cached token"], rows))


# ------------------------------------------------------------------------------------------- the pictures


def draw_curves(axes, rows: dict, key: str, config: dict) -> None:
    """Bits per byte by position, a line for each row with its interval, and where the training ended."""
    for (name, readings), colour in zip(rows.items(), COLOURS, strict=False):
        points = [interval(values) for values in zip(*(each[key] for each in readings), strict=True)]
        mean, half = np.nan_to_num(np.array(points).T)
        middle = config["span"] * (np.arange(len(mean)) + 0.5)
        axes.plot(middle, mean, color=colour, label=NAMES[name], linewidth=1.6)
        axes.fill_between(middle, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel="position in the text (bytes)", ylabel="bits per byte")


def draw_passkeys(axes, rows: dict, config: dict) -> None:
    for i, (name, readings) in enumerate(rows.items()):
        found = {d: value[0] for d, value in by_distance(readings, config).items() if value is not None}
        axes.plot(*zip(*found.items(), strict=True), color=COLOURS[i], marker="osD^vXP"[i], label=NAMES[name])
    axes.set(xlabel="bytes between key and question", ylabel="passkeys found (share)", ylim=(-0.04, 1.04))


def finish(figure, config: dict, path: Path) -> None:
    for axes in figure.axes:
        axes.axvline(config["length"], color="0.4", linestyle=":", linewidth=1.2)
        axes.set_xscale("log", base=2)
        axes.xaxis.set(major_formatter=ticker.FormatStrFormatter("%d"))
        axes.grid(alpha=0.3)
    handles = figure.axes[-1].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=7, frameon=False)
    figure.savefig(path, dpi=100)


def draw(kept: dict, folder: Path) -> None:
    config, encodings = kept["config"], kept["encodings"]
    length, longest = config["length"], config["length"] * config["factor"]
    figure = matplotlib.figure.Figure(figsize=(12, 4.2), layout="constrained")
    for axes, key, title in zip(
        figure.subplots(1, 3),
        ("long", "sliding", "passkey"),
        ("one long window", "windows that slide", ""),
        strict=True,
    ):
        if key == "passkey":
            draw_passkeys(axes, encodings, config)
            axes.set_title("passkeys, one long window")
        else:
            draw_curves(axes, encodings, key, config)
            axes.set_title(f"bits per byte, {title}")
    figure.suptitle(f"Trained at {length} bytes (dotted), read at up to {longest:,}")
    finish(figure, config, folder / "context_extension_encodings.png")

    figure = matplotlib.figure.Figure(figsize=(12, 7.4), layout="constrained")
    grid = figure.subplots(2, 2, sharey="col")
    for (left, right), key, title in zip(
        grid, ("plain", "tuned"), ("as it is", f"after {config['tune_steps']} steps at {longest:,}"), strict=True
    ):
        rows = {method: each[key] for method, each in kept["methods"].items()}
        draw_curves(left, rows, "long", config)
        draw_passkeys(right, rows, config)
        left.set_title(f"bits per byte, {title}")
        right.set_title(f"passkeys, {title}")
    figure.suptitle(f"RoPE trained at {length} bytes (dotted), extended to {longest:,}")
    finish(figure, config, folder / "context_extension_methods.png")


def report(kept: dict, folder: Path) -> str:
    """Writes the tables and the two pictures beside the numbers, and returns the tables."""
    (folder / "context_extension.md").write_text(tables(kept))
    draw(kept, folder)
    return tables(kept)


if __name__ == "__main__":
    results = Path(__file__).parent / "results"
    print(report(json.loads((results / "context_extension.json").read_text()), results))

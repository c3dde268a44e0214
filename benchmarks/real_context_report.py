"""Tables and pictures of real_context.py, from results/real_context.json.

python -m benchmarks.real_context_report      # writes them again
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib.figure
import numpy as np
from matplotlib import ticker

import rope_jax
from benchmarks.context_extension_report import NAMES
from benchmarks.record import markdown
from rope_jax.analysis import wavelengths
from rope_jax.plot import COLOURS, DASHES

METHODS = ("unmodified", "linear", "ntk", "dynamic", "yarn", "longrope", "llama3")
LABELS = {name: NAMES[name] for name in METHODS}
STYLES = {
    name: dict(color=colour, linestyle=dashes)
    for name, colour, dashes in zip(LABELS, (COLOURS[-1], *COLOURS[:-1]), DASHES, strict=True)
}


def perplexity(loss: Sequence[float] | None, low: int, high: int, size: int) -> float | None:
    """``exp`` of the mean loss from position ``low`` to ``high``; None if that part was not read."""
    part = (loss or [])[low // size : high // size]
    return math.exp(np.mean(part)) if len(part) == (high - low) // size else None


def written(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def spans(kept: dict) -> list[tuple[int, int]]:
    """The end of each length, half of the training length long: the second half of a fresh window."""
    lengths = kept["config"]["lengths"]
    return [(length - lengths[0] // 2, length) for length in lengths]


def repeated_shares(kept: dict) -> str:
    """The share of repeated passages in each span, in words."""
    size, again = kept["config"]["bin"], kept["text"]["repeated"]
    *first, last = [f"{np.mean(again[low // size : high // size]):.0%}" for low, high in spans(kept)]
    return f"{', '.join(first)} and {last}"


def exact(asked: list | None) -> float | None:
    """The share of passkeys that are found whole."""
    return None if asked is None else float(np.mean([share == 1 for _, share, _ in asked]))


def digits_right(each: dict, length: int, questions: int) -> list[float]:
    """The share of right digits by depth; NaN for a length that was not read."""
    found = each["passkeys"].get(str(length))
    return [math.nan] * questions if found is None else [share for _, share, _ in sorted(found)]


def fresh_perplexity(kept: dict, low: int, high: int) -> float | None:
    """Of the second half of a fresh window, from position ``low`` of the text."""
    part = (kept["fresh"] or {}).get(str(low))
    return None if part is None else math.exp(np.mean(part))


def schedule_table(kept: dict) -> str:
    config, rows = kept["config"], []
    for name, label in LABELS.items():
        each = kept["schedules"][name] or {"loss": None, "passkeys": {}}
        figures = [perplexity(each["loss"], low, high, config["bin"]) for low, high in spans(kept)]
        shares = [exact(each["passkeys"].get(str(length))) for length in config["lengths"]]
        said = ["-" if share is None else f"{share:.0%}" for share in shares]
        rows.append([label, *map(written, figures), *said])
    fresh = [fresh_perplexity(kept, low, high) for low, high in spans(kept)]
    rows.append(["unmodified, fresh windows", *map(written, fresh), *["-"] * len(config["lengths"])])
    titles = [f"positions {low:,} to {high:,}" for low, high in spans(kept)]
    return markdown(["schedule", *titles, *(f"passkeys at {length:,}" for length in config["lengths"])], rows)


def sliding_table(kept: dict) -> str:
    window, rows = kept["config"]["window"], []
    ends = [(window // 2, window), (window, 2 * window), (2 * window, 4 * window)]
    for sinks, loss in kept["sliding"].items():
        label = f"{sinks} sink tokens" if int(sinks) else "no sink tokens"
        rows.append([label, *(written(perplexity(loss, low, high, window // 4)) for low, high in ends)])
    return markdown([f"{window} keys", *(f"positions {low:,} to {high:,}" for low, high in ends)], rows)


def base_table(kept: dict) -> str:
    config, rows = kept["config"], []
    original, double, *_ = config["lengths"]
    ends = [(0, original // 8), (original // 2, original), (original, double)]
    losses = {float(factor): each for factor, each in kept["bases"].items()}
    unmodified = (kept["schedules"]["unmodified"] or {"loss": None})["loss"]
    losses[1.0] = {str(original): unmodified, str(double): unmodified}
    for factor in sorted(losses):
        short, long = (losses[factor][str(length)] for length in (original, double))
        figures = [perplexity(long if high > original else short, low, high, config["bin"]) for low, high in ends]
        rows.append([f"{factor * kept['text']['base']:,.0f}", f"{factor:g}", *map(written, figures)])
    return markdown(
        ["base", "over the trained base", *(f"positions {low:,} to {high:,}" for low, high in ends)], rows
    )


def pair_wavelengths(kept: dict) -> np.ndarray:
    return wavelengths(rope_jax.Standard(base=kept["text"]["base"])(2 * kept["text"]["pairs"]))


def pair_table(kept: dict) -> str:
    pairs = kept["pairs"]
    rows = [
        [str(i), f"{wavelength:,.0f}", f"{change:+.3f} ± {error:.3f}"]
        for i, (wavelength, change, error) in enumerate(
            zip(pair_wavelengths(kept), pairs["change"], pairs["error"], strict=True)
        )
    ]
    return markdown(["pair", "wavelength (tokens)", "change of the loss (nats)"], rows)


def tables(kept: dict) -> str:
    config, text, found = kept["config"], kept["text"], kept["divisors"]
    lengths = config["lengths"]
    lines = [
        f"`{kept['command']}`: {kept['device']}, {kept['processor']}; Python {kept['python']}, jax {kept['jax']}, "
        f"{kept['date']}. Weights: {text['file']}, trained to {lengths[0]:,} tokens, not fine-tuned here. "
        f"Text: {text['source']} ({text['bytes']:,} bytes, SHA-256 `{text['sha256']}`, {text['tokens']:,} tokens, "
        f"of which the first {text['read']:,} are read, with {text['passkeys']} planted passkeys)."
        + text.get("remark", ""),
        "",
        "Perplexity by position in one pass, and passkeys found after "
        f"{', '.join(f'{length:,}' for length in lengths)} tokens: "
        f"the share of {config['questions']} keys at depths of 5 % to 95 % whose five digits are all right. "
        f"Every schedule is set to {lengths[-1] // lengths[0]} times the training length. Dynamic NTK and LongRoPE "
        "follow the length of the cache. Fresh windows: the second half of windows of "
        f"{lengths[0]:,}, each from its own position 0.",
        "",
        schedule_table(kept),
        "",
        f"Of the tokens in these spans, {repeated_shares(kept)} begin a passage of 16 tokens that stands earlier "
        "in the text. To see the earlier passage is a gain. A dash was not read.",
        "",
    ]
    if found:
        divisors = ", ".join(f"{each:.2f}" for each in found["divisors"])
        start = ", ".join(f"{LABELS[name]} {cost:.2f}" for name, cost in found["start"].items())
        lines += [
            f"LongRoPE's divisors: the best of {found['tried']}, judged by {config['pair tokens']:,} tokens whose "
            f"positions are spread up to {lengths[-1]:,}. Loss in nats: {start}, found {found['cost']:.2f}. "
            f"Divisors: {divisors}.",
            "",
        ]
    lines += [
        f"Perplexity through a cache that keeps {config['window']} tokens and evicts the oldest; "
        f"{config['rows']} rows of text",
        "",
        sliding_table(kept),
        "",
        "Perplexity with another base",
        "",
        base_table(kept),
        "",
    ]
    if kept["pairs"]:
        lines += [
            f"Change of the loss over the first {config['pair tokens']:,} tokens if one pair of features is frozen "
            "in all layers and heads; ± is a standard error. Loss of the whole model: "
            f"{kept['pairs']['loss']:.3f} nats.",
            "",
            pair_table(kept),
            "",
        ]
    shown = ("unmodified", "yarn", "ntk", "dynamic", "linear")
    if all(kept["schedules"][name] for name in shown) and all(kept["sliding"].values()) and kept["together"]:
        lines += beside_published(kept)
    return "\n".join(lines)


def last_eighth(kept: dict, name: str, length: int) -> float | None:
    """Perplexity of the last eighth of ``length`` tokens."""
    each = kept["schedules"][name]
    return each and perplexity(each["loss"], length * 7 // 8, length, kept["config"]["bin"])


def beside_published(kept: dict) -> list[str]:
    """What agrees with published figures, sentence by sentence; only if all figures are there."""
    config, all_spans = kept["config"], spans(kept)
    near, double, _ = all_spans
    original, twice, longest = config["lengths"]

    def ppl(name, span):
        return written(perplexity(kept["schedules"][name]["loss"], *span, config["bin"]))

    def found(name, length):
        asked = kept["schedules"][name]["passkeys"][str(length)]
        return f"{exact(asked):.0%} of the keys and {np.mean([share for _, share, _ in asked]):.0%} of the digits"

    sinks, none = (
        written(perplexity(loss, config["window"], 4 * config["window"], config["window"] // 4))
        for loss in kept["sliding"].values()
    )
    cures, (two, both), pair = kept["cures"], next(iter(kept["together"].items())), kept["pairs"]["change"]
    slow = max(range(len(pair) // 2, len(pair)), key=pair.__getitem__)
    rest = max((abs(each) for each in pair[slow + 3 :]), default=0.0)
    far = f"{double[0]:,} to {double[1]:,}"
    return [
        "Reproduced at 135 million parameters:",
        "",
        "- The unmodified model fails at once beyond its length. Chen et al. 2023 (position interpolation) report "
        f"a perplexity above 1,000. Here {ppl('unmodified', near)} becomes "
        f"{written(last_eighth(kept, 'unmodified', twice))} in the last eighth of {twice:,} tokens and "
        f"{written(last_eighth(kept, 'unmodified', longest))} in that of {longest:,}.",
        "- YaRN reads as well as NTK-aware or better (Peng et al. 2023, fine-tuned: 3.35 and 3.59 at 8,192). "
        f"Here at {far}: {ppl('yarn', double)} and {ppl('ntk', double)}. YaRN finds {found('yarn', twice)}, "
        f"NTK-aware {found('ntk', twice)}.",
        "- A fixed factor costs something within the training length, dynamic NTK nothing (Peng et al. 2023, "
        f"section 3.3): YaRN {ppl('yarn', near)}, NTK-aware {ppl('ntk', near)}, dynamic {ppl('dynamic', near)}.",
        "",
        "Not reproduced, or not comparable:",
        "",
        "- Without sink tokens a sliding cache reads worse, but does not collapse. Xiao et al. 2023 report 5,158 "
        f"without and 5.40 with four sink tokens (Llama 2 13B, 1,024 keys). Here {none} and {sinks}, at "
        f"{config['window']} keys, over tokens {config['window']} to {4 * config['window']:,}.",
        f"- Position interpolation by {longest // original} without fine-tuning reads at {ppl('linear', near)} and "
        f"finds {found('linear', original)}. The published 6.95 to 7.13 are after fine-tuning.",
        f"- Perplexity and keys order the methods differently. At {far} dynamic NTK reads at "
        f"{ppl('dynamic', double)} and finds {found('dynamic', twice)}.",
        "- Published tests hide one key in the text. Here the text has "
        f"{kept['text']['passkeys']} names, and a small model mixes them up: within its length it finds "
        f"{found('unmodified', original)}. Whole keys are few: differences of some of them mean nothing.",
        "- No model was fine-tuned here.",
        "",
        "Which frequencies the model uses:",
        "",
        f"- Frozen, pair 0 costs {pair[0]:.2f} nats and pair {slow} {pair[slow]:.2f}: more than any pair between "
        f"them. From pair {slow + 3} on, no pair costs more than {rest:.4f}.",
        "- Few pairs carry the failure beyond the training length. At positions spread up to "
        f"{longest:,} the loss is {cures['unmodified']:.2f}. With pairs {two.replace(', ', ' and ')} at a quarter "
        f"of their frequency it is {both:.2f}, with all {len(cures['one'])} slow pairs {cures['all']:.2f}.",
        "",
    ]


# ------------------------------------------------------------------------------------------- the pictures


def by_thousands(axis) -> None:
    axis.set(major_formatter=ticker.FuncFormatter(lambda value, _: f"{value / 1024:g}k"))


def draw_schedules(kept: dict) -> matplotlib.figure.Figure:
    """Perplexity by position, and the passkeys by depth and length."""
    config, lengths = kept["config"], kept["config"]["lengths"]
    done = {name: each for name, each in kept["schedules"].items() if each}
    figure = matplotlib.figure.Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.1, 1))
    axes = left.subplots()
    for name in filter(done.get, LABELS):
        mean = np.array(done[name]["loss"]).reshape(-1, 2048 // config["bin"]).mean(axis=1)
        axes.plot(
            1024 + 2048 * np.arange(mean.size), np.exp(mean), label=LABELS[name], linewidth=1.8, **STYLES[name]
        )
    for i, (start, each) in enumerate((kept["fresh"] or {}).items()):
        ends = int(start), int(start) + config["bin"] * len(each)
        label = "fresh windows of 8k" if i == 0 else None
        axes.plot(ends, [np.exp(np.mean(each))] * 2, color="0.7", linewidth=6, zorder=0, label=label)
    axes.axvline(lengths[0], color="0.4", linestyle=":", linewidth=1.2)
    axes.set(yscale="log", xlabel="position (tokens)", ylabel="perplexity", xticks=[0, *lengths])
    by_thousands(axes.xaxis)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    shown = [name for name in LABELS if name in done]
    panels = right.subplots(1, len(lengths), sharey=True)
    for panel, length in zip(panels, lengths, strict=True):
        rows = [digits_right(done[name], length, config["questions"]) for name in shown]
        extent = (0, 100, len(rows) - 0.5, -0.5)
        image = panel.imshow(rows, vmin=0, vmax=1, cmap="viridis", aspect="auto", extent=extent)
        panel.set(title=f"{length // 1024}k", xlabel="depth (%)", xticks=[10, 50, 90])
        panel.set_yticks(range(len(rows)), [LABELS[name] for name in shown])
    right.colorbar(image, ax=panels, label="digits of the passkey right (share)", shrink=0.8)
    left.suptitle(f"Perplexity, trained to {lengths[0]:,} tokens (dotted)")
    unread = any(len(each["passkeys"]) < len(lengths) for each in done.values())
    right.suptitle(f"Passkeys by depth, after 8k, 16k and 32k tokens{' (white: not read)' * unread}")
    figure.suptitle(
        "SmolLM2-135M without fine-tuning: unmodified it fails at once, YaRN reads on and still finds keys"
    )
    return figure


def draw_frequencies(kept: dict) -> matplotlib.figure.Figure:
    """Perplexity by base, the loss by frozen pair, and the loss at far positions by slower pair."""
    config = kept["config"]
    figure = matplotlib.figure.Figure(figsize=(13.5, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    original, double, *_ = config["lengths"]
    losses = {float(factor): each for factor, each in kept["bases"].items()}
    unmodified = kept["schedules"]["unmodified"]["loss"]
    losses[1.0] = {str(original): unmodified, str(double): unmodified}
    factors = sorted(losses)
    ends = [(0, original // 8), (original // 2, original), (original, double)]
    for (low, high), colour, dashes, marker in zip(ends, COLOURS, DASHES, "osD", strict=False):
        which = str(double if high > original else original)
        figures = [perplexity(losses[factor][which], low, high, config["bin"]) for factor in factors]
        read = [(factor, each) for factor, each in zip(factors, figures, strict=True) if each is not None]
        label = f"positions {low // 1024}k to {high // 1024}k"
        left.plot(*zip(*read, strict=True), color=colour, linestyle=dashes, marker=marker, label=label)
    left.set(xscale="log", yscale="log", xlabel="base (over the trained base)", ylabel="perplexity")
    left.set_xticks(factors, [f"{factor:g}" for factor in factors])
    left.set_xticks([], minor=True)
    left.set_yticks(ticks := (10, 20, 50, 100, 200, 500), ticks)
    left.set_yticks([], minor=True)
    left.set_title("A larger base reads further,\na smaller base less far")
    left.legend(frameon=False)

    pairs, lengths = np.arange(kept["text"]["pairs"]), pair_wavelengths(kept)
    change, error = kept["pairs"]["change"], kept["pairs"]["error"]
    middle.bar(pairs, change, yerr=error, color=COLOURS[0], error_kw={"elinewidth": 1})
    middle.set(xlabel="frozen pair (0 is the fastest)", ylabel="rise of the loss (nats)")
    middle.set_title("The fastest pair matters most,\nand one slow pair")

    cures = kept["cures"]
    slowed = [int(pair) for pair in cures["one"]]
    right.bar(slowed, [cures["unmodified"] - each for each in cures["one"].values()], color=COLOURS[0])
    (two, loss), *_ = kept["together"].items()
    right.axhline(cures["unmodified"] - cures["all"], color=COLOURS[1], label=f"all {len(slowed)} pairs")
    right.axhline(
        cures["unmodified"] - loss, color=COLOURS[2], linestyle="--", label=f"pairs {two.replace(', ', ' and ')}"
    )
    right.set(xlabel="pair (the only slower one)", ylabel="fall of the loss at far positions (nats)")
    right.set_xticks(slowed[::2])
    right.set_title("Two pairs at a quarter of their frequency\nremove two thirds of the failure")
    right.legend(frameon=False, loc="center right")
    for axes, shown in ((middle, pairs[::5]), (right, np.array(slowed[::3]))):
        top = axes.secondary_xaxis("top")
        top.set_xticks(
            shown, [f"{each:,.0f}" if each < 1000 else f"{each / 1000:,.0f}k" for each in lengths[shown]]
        )
        top.set_xlabel("wavelength (tokens)")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    figure.suptitle("Which frequencies a trained model uses: SmolLM2-135M, 32 pairs, base 100,000")
    return figure


def draw_sliding(kept: dict) -> matplotlib.figure.Figure:
    """Perplexity by position through a cache that evicts, with and without sink tokens."""
    window = kept["config"]["window"]
    figure = matplotlib.figure.Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    done = {sinks: loss for sinks, loss in kept["sliding"].items() if loss}
    for i, (sinks, loss) in enumerate(done.items()):
        label = f"{sinks} sink tokens kept" if int(sinks) else "no sink tokens"
        middle = window // 4 * (np.arange(len(loss)) + 0.5)
        axes.plot(middle, np.exp(loss), color=COLOURS[i], linestyle=DASHES[i], marker="os"[i], label=label)
    axes.axvline(window, color="0.4", linestyle=":", linewidth=1.2)
    axes.set(yscale="log", xlabel="position (tokens)", ylabel="perplexity")
    axes.set_yticks(ticks := (8, 10, 15, 20, 30), ticks)
    axes.set_yticks([], minor=True)
    figure.suptitle(f"A window of {window} tokens reads worse without the first tokens")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    return figure


def report(kept: dict, folder: Path) -> str:
    """Writes the tables and the pictures beside the numbers, and returns the tables."""
    text = tables(kept)
    (folder / "real_context.md").write_text(text)
    drawings = {
        "schedules": (draw_schedules, kept["schedules"]["unmodified"]),
        "frequencies": (draw_frequencies, kept["pairs"] and kept["together"] and kept["schedules"]["unmodified"]),
        "sliding": (draw_sliding, all(kept["sliding"].values())),
    }
    for name, (draw, ready) in drawings.items():
        if ready:
            draw(kept).savefig(folder / f"real_context_{name}.png", dpi=100)
    return text


if __name__ == "__main__":
    results = Path(__file__).parent / "results"
    print(report(json.loads((results / "real_context.json").read_text()), results))

"""Times what RoPE adds to a training step, and to a token decoded with a cache.

    python -m benchmarks.overhead

The toy LM runs its training step and decodes tokens one by one, with its rope and without. The calls take turns.
The model without rope runs twice: the distance of its ratio from 1 is the noise of the machine.

Predicted, of the default shape: 96 pairs a token and layer, 6 operations each, forward and back: 1,152 beside the
1.1 million of the layer's weights. Queries and keys are read and written once more each way where nothing is fused:
25 MB a step, 2 to 3 ms of about a hundred. For a single token there are only kernels to launch, a few more a layer.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np

from benchmarks import encodings
from benchmarks.clock import in_turns, ratios
from benchmarks.context_extension import training_step
from benchmarks.record import markdown, publish
from configs import toy_lm
from rope_jax.plot import COLOURS

ROUNDS = 301
BATCHES = (1, 8)  # rows that are decoded together
PROMPT, WRITTEN = 64, 64  # tokens in the cache to begin with, and tokens of one timed call
BAR = 1.03
FORMS = {"rope": "rope", "none": "none", "none again": "none"}  # the encoding of each
COMPARED = {"rope": "with RoPE", "none again": "without RoPE, again"}


def decoding(model, params, tokens, prompt: int) -> Callable[[], list]:
    """A call that decodes ``tokens [B, T]`` one by one from index ``prompt`` on, and returns all logits."""

    @functools.partial(jax.jit, donate_argnames="cache")
    def step(params, token, cache):
        hidden, cache = model.apply(params, token, cache=cache, method="hidden")
        return model.apply(params, hidden[:, -1], method="unembed"), cache

    batch, capacity = tokens.shape
    _, cache = step(params, tokens[:, :prompt], model.init_cache(batch=batch, capacity=capacity))
    begun = np.asarray(cache.num_tokens)
    later = [tokens[:, at : at + 1] for at in range(prompt, capacity)]

    def call():
        nonlocal cache
        cache = dataclasses.replace(cache, num_tokens=jnp.asarray(begun))  # rewound: later slots are overwritten
        logits = []
        for token in later:
            one, cache = step(params, token, cache)
            logits.append(one)
        return logits

    return call


def rounding(model) -> float:
    """The difference that another order of float32 sums may make, as a share of the largest logit.

    The roundings of a layer's longest sum are a random walk.
    """
    return model.num_layers * max(model.mlp_dim, model.width) ** 0.5 * float(jnp.finfo(jnp.float32).eps)


def check(turned, plain, params, tokens) -> None:
    """Raises unless both models agree at position 0, and each decodes the logits of its full pass."""
    still = jax.jit(turned.apply)(params, tokens, jnp.zeros_like(tokens))
    for model in (turned, plain):
        at_once = jax.jit(model.apply)(params, tokens)
        allowed = rounding(model) * float(jnp.abs(at_once).max())
        one_by_one = jnp.stack(decoding(model, params, tokens, PROMPT)(), axis=1)
        np.testing.assert_allclose(one_by_one, at_once[:, PROMPT:], rtol=0, atol=allowed)
    np.testing.assert_allclose(still, at_once, rtol=0, atol=allowed)


def measure(
    config: toy_lm.Config = toy_lm.Config(),  # noqa: B008, it is frozen
    rounds: int = ROUNDS,
    batches: Sequence[int] = BATCHES,
    written: int = WRITTEN,
) -> dict:
    """By job: milliseconds of the model without rope, and the ratios of the others in the same round."""
    text, _ = toy_lm.read_corpus(config)
    optimizer = toy_lm.build_optimizer(config)
    fields = dataclasses.asdict(config)
    configs = {name: encodings.Config(**fields, encoding=encoding) for name, encoding in FORMS.items()}
    models = {name: encodings.build_model(each) for name, each in configs.items()}
    params = toy_lm.initial_state(models["rope"], optimizer, config)["params"]
    starts = np.linspace(0, len(text) - PROMPT - written, max(batches)).astype(int)
    tokens = jnp.asarray(toy_lm.windows(text, starts, PROMPT + written - 1))
    check(models["rope"], models["none"], params, tokens)

    steps = {name: training_step(each, text, optimizer) for name, each in configs.items()}
    result = {f"training step, {config.batch} x {config.length}": summary(in_turns(steps, rounds))}
    for batch in batches:
        calls = {name: decoding(model, params, tokens[:batch], PROMPT) for name, model in models.items()}
        result[f"decoded token, rows: {batch}"] = summary(in_turns(calls, rounds), written)
    return result


def summary(times: Mapping[str, Sequence[float]], count: int = 1) -> dict:
    """Quartiles of the milliseconds of one of ``count`` steps, and of the ratios round by round."""
    alone = statistics.quantiles([time / count for time in times["none"]], n=4, method="inclusive")
    over = {f"{name} over none": ratios(times, name, "none") for name in COMPARED}
    return {name: [round(q, 4) for q in quartiles] for name, quartiles in {"milliseconds": alone, **over}.items()}


def said(quartiles: Sequence[float], digits: str) -> str:
    low, middle, high = (format(q, digits) for q in quartiles)
    return f"{middle} ({low} to {high})"


def table(kept: dict) -> str:
    rows = []
    for job, row in kept["result"].items():
        over = [said(row[f"{name} over none"], ".3f") for name in COMPARED]
        rows.append([job, said(row["milliseconds"], ".3g"), *over])
    return markdown(["", "without RoPE, ms", *(f"{label}, times that" for label in COMPARED.values())], rows)


def draw(kept: dict) -> matplotlib.figure.Figure:
    """A dot for the median of each ratio, a bar from quartile to quartile, and the limit."""
    jobs = kept["result"]
    figure = matplotlib.figure.Figure(figsize=(8, 1.4 + 0.8 * len(jobs)), layout="constrained")
    axes = figure.subplots()
    for (name, label), colour, beside in zip(COMPARED.items(), (COLOURS[0], "0.55"), (-0.13, 0.13), strict=True):
        low, middle, high = zip(*(row[f"{name} over none"] for row in jobs.values()), strict=True)
        places = [place + beside for place in range(len(jobs))]
        axes.hlines(places, low, high, color=colour, linewidth=3, alpha=0.5)
        axes.plot(middle, places, "o", color=colour, label=label)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.axvline(BAR, color=COLOURS[4], linestyle="--", linewidth=1.2, label=f"bar: {BAR}")
    axes.set(yticks=range(len(jobs)), yticklabels=jobs, ylim=(len(jobs) - 0.5, -0.5))
    axes.set(xlabel="time over that of the model without RoPE, round by round: median and quartiles")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure


if __name__ == "__main__":
    publish(__file__, measure(), table, draw)

"""Trains small vision transformers on 8 x 8 boards and tests them on larger boards, by position encoding.

    python -m benchmarks.vision      # 15 minutes on two busy CPU cores

A rook, a bishop or a knight stands on a board with eight pieces of different colours, and attacks exactly one of
them. The model names the colour of the attacked piece; guessing is right once in eight. A rook attacks its row and
column, a bishop its diagonals, a knight the cells at a step of (1, 2): relative positions in two axes.

A token is a cell with a piece; empty cells are dropped, like masked patches. Every board then has nine tokens, and
a larger board changes nothing but the positions.

- axial: fixed frequencies, half of the pairs read the row and half the column (Heo et al. 2024, "Rotary Position
  Embedding for Vision Transformer", section 3.1; base 100);
- mixed: learned wave vectors for each layer and head, initialised by axes at a random angle (section 3.2; base 10);
- learned absolute: a table of the 8 x 8 cells, resized to larger boards (Dosovitskiy et al. 2021, section 3.2);
- none: no positions, the floor;
- a control: mixed whose wave vectors start along the axes.

The rotary models are also tested with interpolated coordinates, as the table is.
"""

import concurrent.futures
import dataclasses
import functools
import json
import math
from pathlib import Path

import flax.linen as nn
import jax
import matplotlib.figure
import numpy as np
import optax
import tqdm

import rope_jax
from benchmarks.context_extension_report import interval
from benchmarks.record import markdown, publish
from rope_jax.plot import COLOURS, DASHES

SIDE = 8  # of the boards in training
SIDES = (8, 12, 16, 24)
ATTACKERS = {"rook": "same row or column", "bishop": "same diagonal", "knight": "a step of (1, 2)"}
NUM_COLOURS = 8
NAMES = {
    "axial": "axial",
    "mixed": "mixed",
    "absolute": "learned absolute",
    "none": "no positions",
    "aligned": "mixed, from the axes",
}
DRAWN = {"axial": COLOURS[0], "mixed": COLOURS[4], "absolute": COLOURS[2], "none": COLOURS[6]}
FINDING = (
    "Trained on 8 x 8 boards: only learned wave vectors solve diagonals, and every encoding loses on larger boards"
)
ROTARY = ("axial", "mixed", "aligned")
SEEDS = 3
STEPS, BATCH, LEARNING_RATE = 2400, 128, 2e-3
NUM_TESTS = 6144  # boards of each size


# ----------------------------------------------------------------------------------------------- the task


def boards(rng: np.random.Generator, side: int, count: int) -> dict[str, np.ndarray]:
    """Random boards: pieces ``[B, 9]``, positions ``[B, 9, 2]``; label, attacker and distance ``[B]``.

    Token 0 is the attacker, token 1 the piece that it attacks. The distance is the larger coordinate difference.
    """
    rows = np.arange(count)
    cells = np.stack(np.divmod(np.arange(side * side), side), axis=-1)  # [cells, 2]
    at, attacker = rng.integers(0, side * side, count), rng.integers(0, len(ATTACKERS), count)
    down, right = np.moveaxis(abs(cells[None] - cells[at][:, None]), -1, 0)  # [B, cells]
    attacks = np.stack([(down == 0) | (right == 0), down == right, down * right == 2])[attacker, rows]
    itself = down + right == 0
    draw = rng.random((count, side * side))
    target = np.where(attacks & ~itself, draw, -1).argmax(axis=1)
    others = np.argsort(np.where(attacks | itself, -1, draw), axis=1)[:, 1 - NUM_COLOURS :]
    colours = rng.permuted(np.tile(np.arange(NUM_COLOURS), (count, 1)), axis=1)
    return {
        "pieces": np.concatenate([colours, NUM_COLOURS + attacker[:, None]], axis=1)[:, [-1, *range(NUM_COLOURS)]],
        "positions": cells[np.concatenate([at[:, None], target[:, None], others], axis=1)].astype(np.int32),
        "label": colours[:, 0],
        "attacker": attacker,
        "distance": np.maximum(down, right)[rows, target],
    }


# ---------------------------------------------------------------------------------------------- the models


@dataclasses.dataclass(frozen=True)
class Mixed:
    """Wave vectors ``[N, 2, R/2]``: a pair of orthogonal axes for each head, at a random angle (Heo et al. 2024).

    Attributes:
      num_heads: N.
      seed: of the angles; None aligns all heads with the rows and columns.
      base: of the lengths ``base ** (-4 i / R)``.
    """

    num_heads: int
    seed: int | None
    base: float = 10.0

    def __call__(self, rotary_dim: int) -> rope_jax.Frequencies:
        length = self.base ** (-4 * np.arange(rotary_dim // 4) / rotary_dim)
        angle = np.zeros(self.num_heads)
        if self.seed is not None:
            angle = np.random.default_rng(self.seed).uniform(0, 2 * math.pi, self.num_heads)
        across = angle[:, None] + np.array([0, math.pi / 2])  # [N, 2]
        direction = np.stack([np.cos(across), np.sin(across)], axis=1)  # [N, A, 2]
        return rope_jax.Frequencies((direction[..., None] * length).reshape(self.num_heads, 2, -1))


class VisionTransformer(nn.Module):
    """Pieces and their positions -> logits of the colours: pre-norm blocks without causality, then a mean.

    Attributes:
      encoding: a name of :data:`NAMES`.
      seed: of the random angles.
      side: of the boards in the call; a table of another size is resized.
    """

    encoding: str
    seed: int = 0
    side: int = SIDE
    width: int = 64
    num_heads: int = 4
    num_layers: int = 2

    def rope(self, layer: int) -> rope_jax.Rope | None:
        head_dim = self.width // self.num_heads
        if self.encoding == "axial":
            schedule = rope_jax.Axial(sizes=(head_dim // 2,) * 2, schedule=rope_jax.Standard(base=100.0))
            return rope_jax.Rope(head_dim, schedule)
        if self.encoding in ROTARY:
            seed = None if self.encoding == "aligned" else 1000 * self.seed + layer
            return rope_jax.Rope(head_dim, Mixed(self.num_heads, seed))
        return None

    @nn.compact
    def __call__(self, pieces, positions):
        x = nn.Embed(NUM_COLOURS + len(ATTACKERS), self.width, embedding_init=nn.initializers.normal(0.02))(pieces)
        if self.encoding == "absolute":
            table = self.param("table", nn.initializers.normal(0.02), (SIDE, SIDE, self.width))
            if self.side != SIDE:
                table = jax.image.resize(table, (self.side, self.side, self.width), "bicubic", antialias=False)
            x += table[positions[..., 0], positions[..., 1]]
        for layer in range(self.num_layers):
            rope = self.rope(layer)
            attention = rope_jax.RotaryAttention(
                num_heads=self.num_heads,
                head_dim=self.width // self.num_heads,
                rope=rope,
                learn_frequencies=isinstance(rope and rope.schedule, Mixed),
                causal=False,
                name=f"attention_{layer}",
            )
            x += attention(nn.LayerNorm()(x), None if rope is None else positions)
            h = nn.Dense(2 * self.width)(nn.LayerNorm()(x))
            x += nn.Dense(self.width)(nn.gelu(h))
        return nn.Dense(NUM_COLOURS)(nn.LayerNorm()(x).mean(axis=1))


# ------------------------------------------------------------------------------------- training and testing


def train(model: VisionTransformer, steps: int = STEPS):
    """The parameters after training on random 8 x 8 boards, and the loss of each step."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, LEARNING_RATE, max(steps // 20, 1), steps, LEARNING_RATE / 100
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01))

    def loss(params, board):
        logits = model.apply(params, board["pieces"], board["positions"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, board["label"]).mean()

    @jax.jit
    def step(params, state, board):
        cost, gradient = jax.value_and_grad(loss)(params, board)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, cost

    rng = np.random.default_rng(model.seed)
    board = boards(rng, SIDE, BATCH)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(model.seed), board["pieces"], board["positions"]))
    state, losses = optimizer.init(params), []
    for _ in range(steps):
        params, state, cost = step(params, state, boards(rng, SIDE, BATCH))
        losses.append(cost)
    return params, np.array(losses)


@functools.partial(jax.jit, static_argnames="model")
def answers(model: VisionTransformer, params, pieces, positions) -> jax.Array:
    """The likeliest colour ``[B]``."""
    return model.apply(params, pieces, positions).argmax(axis=-1)


def shares(model: VisionTransformer, params, side: int, count: int = NUM_TESTS, interpolated: bool = False) -> dict:
    """By attacker, the share of right answers: of all boards, near (distances as in training) and far."""
    board = boards(np.random.default_rng((7, side)), side, count)
    positions = board["positions"]
    if model.encoding == "absolute":
        model = model.clone(side=side)
    elif interpolated:
        positions = (positions * (SIDE / side)).astype(np.float32)
    right = np.asarray(answers(model, params, board["pieces"], positions)) == board["label"]
    found = {}
    for number, attacker in enumerate(ATTACKERS):
        asked, near = board["attacker"] == number, board["distance"] < SIDE
        parts = {"all": asked, "near": asked & near, "far": asked & ~near}
        found[attacker] = {
            part: round(float(right[chosen].mean()), 4) for part, chosen in parts.items() if chosen.any()
        }
    return found


def run(encoding: str, seed: int, steps: int, count: int) -> dict:
    """One training and its tests: shares by size, with interpolated coordinates too, and the wave vectors."""
    model = VisionTransformer(encoding, seed)
    params, losses = train(model, steps)
    result = {
        "loss": round(float(losses[-100:].mean()), 4),
        "shares": {str(side): shares(model, params, side, count) for side in SIDES},
    }
    if encoding in ROTARY:
        result["interpolated"] = {str(side): shares(model, params, side, count, True) for side in SIDES}
    if encoding == "mixed":
        layers = [params["params"][f"attention_{layer}"]["inv_freq"] for layer in range(model.num_layers)]
        result["wave vectors"] = np.asarray(layers, np.float64).round(4).tolist()
    return result


def measure(steps: int = STEPS, seeds: int = SEEDS, count: int = NUM_TESTS, workers: int = 2) -> dict:
    """Trains and tests every encoding and seed."""
    runs = [(encoding, seed) for seed in range(seeds) for encoding in NAMES]
    found: dict[str, list] = {encoding: [] for encoding in NAMES}
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(run, *each, steps, count) for each in runs]
        for (encoding, _), future in zip(tqdm.tqdm(runs), futures, strict=True):
            found[encoding].append(future.result())
    sizes = dict(steps=steps, batch=BATCH, learning_rate=LEARNING_RATE, tests=count)
    return {"config": sizes, "encodings": found}


# ---------------------------------------------------------------------------------------- table and picture


def means(kept: dict, encoding: str, key: str, side: int, attacker: str, part: str = "all"):
    """The mean share over seeds and half of its 95 % interval; None if it was not measured."""
    readings = kept["result"]["encodings"][encoding]
    found = [reading.get(key, {}).get(str(side), {}).get(attacker, {}).get(part) for reading in readings]
    return interval(found)


def said(value: tuple[float, float] | None) -> str:
    return "-" if value is None else f"{value[0]:.2f} ± {value[1]:.2f}"


def table(kept: dict) -> str:
    """The share of right answers by attacker, encoding and size of the board."""
    rows = []
    for attacker in ATTACKERS:
        for encoding, name in NAMES.items():
            cells = [said(means(kept, encoding, "shares", side, attacker)) for side in SIDES]
            parts = [said(means(kept, encoding, "shares", SIDES[-1], attacker, part)) for part in ("near", "far")]
            scaled = said(means(kept, encoding, "interpolated", SIDES[-1], attacker))
            rows.append([attacker, name, *cells, *parts, scaled])
    last = f"{SIDES[-1]} x {SIDES[-1]}"
    titles = ["attacker", "encoding", *(f"{side} x {side}" for side in SIDES)]
    titles += [f"{last}, distance below {SIDE}", f"{last}, distance from {SIDE}", f"{last}, interpolated"]
    return markdown(titles, rows)


def whole_table(kept: dict) -> str:
    """The table with its command, machine and sizes, for the .md file."""
    config, seeds = kept["result"]["config"], len(kept["result"]["encodings"]["none"])
    lines = [
        f"`{kept['command']}`: {kept['device']}, {kept['processor']}; Python {kept['python']}, jax {kept['jax']}, "
        f"{kept['date']}. Share of right answers on {config['tests']:,} boards of each size, after "
        f"{config['steps']:,} steps of {config['batch']} boards of {SIDE} x {SIDE}. Guessing is right in 0.12. "
        f"Means of {seeds} seeds; ± is a 95 % interval of the mean (Student's t).",
        "",
        table(kept),
        "",
        "Distance: the larger difference, of rows or of columns, between the attacker and the attacked piece. "
        f"Interpolated: coordinates times {SIDE}/{SIDES[-1]}. The table of learned absolute positions is always "
        "resized, which interpolates too.",
    ]
    return "\n".join(lines) + "\n"


def draw(kept: dict) -> matplotlib.figure.Figure:
    """A panel for each attacker: the share of right answers by the size of the board, bars are 95 % intervals."""
    figure = matplotlib.figure.Figure(figsize=(11, 4.4), layout="constrained")
    panels = figure.subplots(1, len(ATTACKERS), sharey=True)
    for axes, (attacker, reads) in zip(panels, ATTACKERS.items(), strict=True):
        for i, (encoding, colour) in enumerate(DRAWN.items()):
            mean, half = np.array([means(kept, encoding, "shares", side, attacker) for side in SIDES]).T
            beside = np.array(SIDES) + 0.25 * (i - 1.5)  # so that bars do not hide each other
            ends = [np.minimum(half, mean), np.minimum(half, 1 - mean)]  # a share is between 0 and 1
            style = dict(color=colour, linestyle=DASHES[i], marker="osD^"[i], markersize=5, label=NAMES[encoding])
            axes.errorbar(beside, mean, yerr=ends, elinewidth=1, capsize=2, **style)
        axes.axhline(1 / NUM_COLOURS, color="0.4", linewidth=0.8)
        axes.set(title=f"{attacker}: {reads}", xlabel="side of the board (cells)", ylim=(0, 1.04))
        axes.set_xticks(SIDES)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("right answers (share)")
    panels[0].text(SIDES[-1], 1 / NUM_COLOURS - 0.05, "guessing", ha="right", va="top", color="0.35", fontsize=9)
    figure.suptitle(FINDING)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


if __name__ == "__main__":
    publish(__file__, measure(), table, draw, ("flax", "optax"))
    results = Path(__file__).parent / "results"
    results.joinpath("vision.md").write_text(whole_table(json.loads(results.joinpath("vision.json").read_text())))

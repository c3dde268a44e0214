"""Chooses the program of an attention: blocks of plain JAX, or a kernel."""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from rope_jax._checks import check_axes, check_choice, check_flag
from rope_jax._jax_internals import min_dim
from rope_jax.attention.facts import Facts
from rope_jax.attention.kernels import splash
from rope_jax.attention.quantized import Quantized
from rope_jax.attention.tiling import BlockSizes

AttentionBackend = Literal["xla", "blocks", "splash", "cudnn", "plain"]
"""The programs of attention; see :func:`rope_jax.attention.explain`."""

# Queries and keys of a block, by measurement on CPUs (benchmarks/attention.py); elsewhere large matrix products.
BLOCKS = {"cpu": BlockSizes(256, 256), "gpu": BlockSizes(512, 1024), "tpu": BlockSizes(512, 1024)}
MAX_KEYS = {"cpu": 1024, "gpu": 4096, "tpu": 4096}  # of a block with few queries
MAX_REDUCED_ROWS = 8  # rows of a product with few queries that a GPU computes without its matrix units
SYMBOLIC_BLOCK = 128  # of lengths that are not known when a program is exported


def block_sizes(q, k, implementation: AttentionBackend | None, platform: str) -> BlockSizes:
    """The queries and keys of a block, for q ``[B, N, T, H]`` and k ``[..., B, K, S, H]``."""
    length, kv_length = q.shape[2], k.shape[-2]
    if implementation in ("xla", "plain"):
        return BlockSizes(length, kv_length)
    most = BLOCKS[platform]
    queries = _block(length, most.queries)
    # Few queries, as in a decode step, take more keys at a time.
    most_keys = (
        most.keys
        if not isinstance(queries, int)
        else max(most.keys, min(MAX_KEYS[platform], most.keys * most.queries // max(queries, 1)))
    )
    rows = queries * (q.shape[1] // k.shape[-3])  # of a product with the keys of a head
    by_reduction = platform == "gpu" and isinstance(rows, int) and rows <= MAX_REDUCED_ROWS
    return BlockSizes(queries, _block(kv_length, most_keys), platform == "cpu", by_reduction)


def _block(length, most: int):
    """The size of blocks of at most ``most`` tokens that divide the length nearly evenly."""
    if not isinstance(length, int):
        return min_dim(length, SYMBOLIC_BLOCK)
    count = -(-length // most)
    return -(-length // count)


def is_long_prompt(q, k) -> bool:
    """Whether q ``[B, N, T, H]`` is long enough for a kernel, and the keys are not in eight bits."""
    length = q.shape[2]
    return isinstance(length, int) and length > BLOCKS["tpu"].queries and not isinstance(k, Quantized)


def choose_path(
    q, k, layer, facts: Facts, implementation: AttentionBackend | None, *, platform: str, divided: bool
) -> AttentionBackend:
    """The program that serves q ``[B, N, T, H]`` and k ``[..., B, K, S, H]`` on a platform.

    Raises:
      TypeError: if an argument is of another kind.
      ValueError: if the implementation was asked for by name and cannot serve, with the reason.
    """
    if implementation in ("xla", "blocks", "plain"):
        return implementation
    reason = why_not_splash(q, k, layer, facts, platform=platform, divided=divided)
    if reason is None:
        return "splash" if implementation == "splash" or is_long_prompt(q, k) else "blocks"
    if implementation == "splash":
        raise ValueError(f"implementation must be None, 'blocks' or 'xla', got 'splash': {reason}")
    return "blocks"


def why_not_splash(q, k, layer, facts: Facts, *, platform: str, divided: bool) -> str | None:
    """The reason why the splash kernel cannot serve; None if it can."""
    if platform != "tpu":
        return f"the kernel is for a TPU, not for a {platform.upper()}"
    if divided:
        return "XLA divides the program among devices, but no kernel: call attention inside shard_map"
    if layer is not None or isinstance(k, Quantized) or facts.query_index is not None:
        return "queries and keys must lie in the order of their sequence indices 0, 1, 2, ..., outside a cache"
    given = {
        "traced window": facts.traced_window,
        "attention mask": facts.mask,
        "bias": facts.bias,
        "position bias": facts.position_bias,
        "dropout": facts.dropout_rate or None,
    }
    if used := [name for name, value in given.items() if value is not None]:
        return f"the kernel has no {used[0]}"
    return splash.unsupported(q, k, window=facts.known_window)


def why_not_cudnn(q, facts: Facts, *, platform: str | None = None) -> str | None:
    """The reason why cuDNN cannot serve; None if it can, as far as is known before the program is lowered."""
    if platform not in (None, "gpu"):
        return f"cuDNN is for a GPU, not for a {platform.upper()}"
    given = {
        "logit_cap": facts.logit_cap,
        "dropout_rate": facts.dropout_rate or None,
        "sink_logits": facts.sink_logits,
    }
    if used := [name for name, value in given.items() if value is not None]:
        return f"cuDNN has no {used[0]}"
    if platform == "gpu" and q.dtype not in (jnp.float16, jnp.bfloat16):
        return f"cuDNN takes float16 and bfloat16, got {q.dtype}"
    return None


class Explanation(NamedTuple):
    """The path of an attention call, and the reason why a faster path does not serve; printed as a sentence."""

    path: AttentionBackend
    blocks: BlockSizes | None
    reason: str

    def __str__(self) -> str:
        sizes = "" if self.blocks is None else f" of {self.blocks.queries} queries and {self.blocks.keys} keys"
        return f"{self.path}{sizes}: {self.reason}"


def explain(
    q,
    k,
    facts: Facts,
    *,
    platform: Literal["cpu", "gpu", "tpu"],
    implementation: AttentionBackend | None = None,
    divided: bool = False,
) -> Explanation:
    """Says which program attention takes, and why not a faster one.

    ==========  =====================================================================================
    path        serves
    ==========  =====================================================================================
    ``splash``  a TPU, T over 512, bfloat16 and float32: causal, a fixed window, soft cap, segments,
                padding, training and prompts before an empty cache; inside ``shard_map`` on a mesh
    ``blocks``  everything on every platform; skips blocks that no query may read
    ``xla``     everything, by name: forms all T S scores
    ``cudnn``   a GPU, by name: float16 and bfloat16, without soft cap, dropout, sinks and second derivatives
    ``plain``   everything, by name: as ``xla``, in operations of JAX alone, whose derivative JAX makes; for tools
                that read a jaxpr and know no primitive of rope_jax, such as converters to ONNX
    ==========  =====================================================================================

    Args:
      q: ``[B, T, N, H]``, an array or its shape (:class:`jax.ShapeDtypeStruct`).
      k: ``[B, S, K, H]``, likewise.
      facts: of the call, :class:`Facts`. For a layer, ``plan.facts()`` with the layer's scale, soft cap and dropout
        by ``dataclasses.replace``; before an empty cache, ``plan.facts(fresh=True)`` and the keys of the prompt.
      platform: the platform that the program is lowered for.
      implementation: as in the call.
      divided: whether XLA divides the program among devices, outside ``shard_map``.

    Returns:
      :class:`Explanation`.

    Raises:
      TypeError: if an argument is of another kind.
      ValueError: if the implementation was asked for by name and cannot serve, with the reason.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rope_jax.attention import Facts, explain
      >>> q = jax.ShapeDtypeStruct((1, 8192, 32, 128), jnp.bfloat16)
      >>> k = jax.ShapeDtypeStruct((1, 8192, 8, 128), jnp.bfloat16)
      >>> print(explain(q, k, Facts(causal=True), platform="tpu"))
      splash: jax's kernel for a TPU
      >>> print(explain(q, k, Facts(causal=True), platform="cpu"))
      blocks of 256 queries and 256 keys: the kernel is for a TPU, not for a CPU
    """
    check_choice("platform", platform, tuple(BLOCKS))
    check_choice("implementation", implementation, get_args(AttentionBackend), optional=True)
    check_flag("divided", divided)
    if not isinstance(facts, Facts):
        raise TypeError(f"facts must be Facts, as of plan.facts(), got {type(facts).__name__}")
    for name, x in (("q", q), ("k", k)):
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            raise TypeError(f"{name} must be an array or a jax.ShapeDtypeStruct, got {type(x).__name__}")
    check_axes("q", q, "B T N H")
    check_axes("k", k, "B S K H", B=q.shape[0], H=q.shape[3])
    if k.shape[2] and q.shape[2] % k.shape[2]:
        raise ValueError(f"q must have a multiple of K={k.shape[2]} heads, got N={q.shape[2]}")
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"q and k must not be empty, got shapes {q.shape} and {k.shape}")
    if implementation == "cudnn":
        if reason := why_not_cudnn(q, facts, platform=platform):
            raise ValueError(f"implementation must not be 'cudnn': {reason}")
        return Explanation("cudnn", None, "asked for by name")
    q, k = (jax.ShapeDtypeStruct((x.shape[0], x.shape[2], x.shape[1], x.shape[3]), x.dtype) for x in (q, k))
    path = choose_path(q, k, None, facts, implementation, platform=platform, divided=divided)
    if path == "splash":
        return Explanation(path, None, "jax's kernel for a TPU")
    reason = f"implementation={implementation!r}"
    if implementation is None:
        too_short = f"the kernel takes a known T over {BLOCKS['tpu'].queries}, got T={q.shape[2]}"
        reason = why_not_splash(q, k, None, facts, platform=platform, divided=divided) or too_short
    return Explanation(path, block_sizes(q, k, implementation, platform), reason)

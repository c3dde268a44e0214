"""Calls jax's splash attention kernel for a TPU on arrays ``[B, N, T, H]``: forward, and the backward pass.

The kernel is jax's own: :mod:`jax.experimental.pallas.ops.tpu.splash_attention`. This module chooses the blocks and
the backward kernels, pads the sequence, and applies the scale.
"""

import functools
import inspect
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rope_jax._jax_internals import (
    check_vma,
    default_matmul_precision,
    splash_attention_kernel,
    varying_axes,
)
from rope_jax._jax_internals import splash_attention as jax_splash

LANES = 128
MIN_BLOCK, MAX_BLOCK = 512, 1024  # tokens, in sequences that are as long
MAX_HEAD_DIM = 256  # wider heads do not fit on every chip
WIDE_BYTES = 512  # of a head; wider ones take blocks of MIN_BLOCK
LOW_PRECISION = None, "default", "fastest", "bfloat16"  # settings of jax_default_matmul_precision
PADDING = np.iinfo(np.int32).min  # the segment number of the tokens that pad the sequence


class _Blocks(NamedTuple):
    length: int  # tokens, with padding
    block: int  # tokens of a block of queries, and of keys
    compute: int  # keys that are multiplied at once
    fused: bool  # one backward kernel instead of two
    tokens_last: bool  # whether q, k and v lie as [B, N, H, T] in memory: in whole registers, as rotated


def unsupported(q, k, *, window=None) -> str | None:
    """The reason why the kernel cannot serve ``q [B, N, T, H]`` and ``k [B, K, T, H]``, or None."""
    if not all(isinstance(size, int) for size in (*q.shape, *k.shape)):
        return f"sizes must be known when the program is compiled, got q {q.shape} and k {k.shape}"
    if 0 in q.shape or 0 in k.shape:
        return f"arrays must not be empty, got q {q.shape} and k {k.shape}"
    if q.dtype != k.dtype or q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"q and k must both be bfloat16 or both float32, got {q.dtype} and {k.dtype}"
    if q.shape[2] != k.shape[2]:
        return f"queries and keys must be the same tokens, got {q.shape[2]} queries and {k.shape[2]} keys"
    if q.shape[1] % k.shape[1]:
        return f"N must be a multiple of K, got {q.shape[1]} and {k.shape[1]}"
    if q.shape[3] > MAX_HEAD_DIM:
        return f"head_dim must be at most {MAX_HEAD_DIM}, got {q.shape[3]}"
    if not (window is None or isinstance(window, int)):
        return "the window must be an int, got an array"
    return _moved()


def forward(
    q,
    k,
    v,
    segments,
    *,
    causal: bool,
    window: int | None,
    scale: float,
    logit_cap: float | None,
    interpret: bool = False,
    save_log_total: bool = True,
) -> tuple[jax.Array, jax.Array | None]:
    """``softmax(scale q.k) v``, and the logarithm of the sum in each softmax.

    Args:
      q: ``[B, N, T, H]``, bfloat16 or float32.
      k: ``[B, K, T, H]``; N is a multiple of K, and query head n reads key head ``n // (N/K)``.
      v: ``[B, K, T, H]``.
      segments: None, or int32 ``[B or 1, T]`` above ``PADDING``: tokens read tokens of the same number.
      causal: query t reads keys ``s <= t``.
      window: query t reads keys with ``|t - s| < window``.
      scale: multiplies q.k. It is multiplied into k, which is then rounded to its dtype.
      logit_cap: soft bound c of the scores: ``c tanh(scale q.k / c)``.
      interpret: runs the kernel on any platform, slowly.
      save_log_total: computes the second result; the kernel writes it 128 times.

    Returns:
      ``[B, N, T, H]`` in q's dtype; ``log(sum(exp(scores)))`` in float32 ``[B, N, T]``, or None.
    """
    window = None if window is None or window >= q.shape[2] else window
    blocks = _blocks(q, window)
    kernel = _kernel(blocks, causal, window, logit_cap, save_log_total, interpret)

    def attend(q, k, v, segments):
        results = kernel(q, k, v, _segment_ids(segments))
        return (results[0], results[1][0]) if save_log_total else (results,)

    segments = _pad_segments(segments, causal, q, blocks)
    results = _over_batch(attend, *(_pad(x, blocks) for x in (q, _scaled(k, scale), v)), segments)
    out, *log_total = (x[:, :, : q.shape[2]] for x in results)
    return out, log_total[0] if save_log_total else None


def backward(
    q,
    k,
    v,
    segments,
    out,
    log_total,
    dout,
    *,
    causal: bool,
    window: int | None,
    scale: float,
    logit_cap: float | None,
    dlog_total=None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The cotangents of q, k and v from those of both results of :func:`forward`.

    Args:
      q, k, v, segments, causal, window, scale, logit_cap, interpret: as in :func:`forward`.
      out, log_total: the results of :func:`forward`.
      dout: ``[B, N, T, H]``, cast to q's dtype.
      dlog_total: float32 ``[B, N, T]``, or None for zeros.

    Returns:
      The cotangents in the shapes and dtypes of q, k and v.
    """
    window = None if window is None or window >= q.shape[2] else window
    blocks = _blocks(q, window)
    kernel = _kernel(blocks, causal, window, logit_cap, False, interpret)
    # The kernels compute d_scores = weights * (dout.v - delta).
    delta = jnp.einsum("bnth,bnth->bnt", out.astype(jnp.float32), dout.astype(jnp.float32))
    if dlog_total is not None:
        delta -= dlog_total

    def differentiate(q, k, v, log_total, dout, delta, segments):
        return _differentiate(kernel, q, k, v, _segment_ids(segments), log_total, dout, delta)

    segments = _pad_segments(segments, causal, q, blocks)
    arrays = (q, _scaled(k, scale), v, log_total, dout.astype(q.dtype), delta)
    dq, dk, dv = (
        x[:, :, : q.shape[2]] for x in _over_batch(differentiate, *(_pad(x, blocks) for x in arrays), segments)
    )
    return dq, _scaled(dk, scale), dv


# ------------------------------------------------------------------------------------------------- the sequence


def _blocks(q, window: int | None) -> _Blocks:
    """The blocks for q: the shortest padded sequence that divides into large blocks."""
    *_, length, head_dim = q.shape
    length += -length % LANES
    # Of larger blocks, a short window reads few keys, and wide heads do not fit on the chip.
    is_small = (window is not None and window <= MIN_BLOCK) or head_dim * q.dtype.itemsize > WIDE_BYTES
    largest = MIN_BLOCK if is_small else MAX_BLOCK
    while (block := _divisor(length, largest)) < min(length, MIN_BLOCK):
        length += LANES
    compute = block // 2 if block == MAX_BLOCK else block
    # The single backward kernel writes a whole dq for each block of keys: more than one take long to add.
    is_fused = length == block
    return _Blocks(length, block, compute, is_fused, head_dim % LANES != 0)


def _divisor(size: int, largest: int) -> int:
    """The largest divisor of a multiple of 128 that is itself a multiple of 128, and at most ``largest``."""
    return max(part for part in range(LANES, min(size, largest) + 1, LANES) if size % part == 0)


def _scaled(x, scale: float):
    """x times the scale, rounded once."""
    return x if scale == 1.0 else (x.astype(jnp.float32) * jnp.float32(scale)).astype(x.dtype)


def _pad(x, blocks: _Blocks):
    """x ``[B, N, T, ...]`` with zeros behind T."""
    zeros = [(0, 0)] * x.ndim
    zeros[2] = (0, blocks.length - x.shape[2])
    return jnp.pad(x, zeros)


def _pad_segments(segments, causal: bool, q, blocks: _Blocks):
    """Segment numbers in which no token reads padding; a causal query reads none in any case."""
    length = q.shape[2]
    if segments is None and (causal or blocks.length == length):
        return None
    if segments is None:
        segments = jnp.zeros((1, length), jnp.int32)
    return jnp.pad(segments, [(0, 0), (0, blocks.length - length)], constant_values=PADDING)


def _segment_ids(segments):
    return None if segments is None else jax_splash.SegmentIds(segments, segments)


# -------------------------------------------------------------------------------------------------- the kernel


class _Band(jax_splash.LocalMask):
    """Keys near the query, in time that grows with the number of blocks, not of scores."""

    def __getitem__(self, index):
        rows, columns = index
        # t - s of every score of the block
        differences = np.arange(rows.start - columns.stop + 1, rows.stop - columns.start)[:, None]
        visible = self.mask_function(differences, np.zeros((1, 1), differences.dtype))
        if visible.all() or not visible.any():
            return np.full((rows.stop - rows.start, columns.stop - columns.start), visible.all())
        return super().__getitem__(index)


@functools.lru_cache(maxsize=64)
def _kernel(blocks: _Blocks, causal: bool, window: int | None, logit_cap, save_residuals: bool, interpret: bool):
    """The kernel with its tables, in which each block of queries finds the next block of keys, as numpy arrays."""
    length, block, compute, fused, tokens_last = blocks
    mask: jax_splash.Mask = jax_splash.FullMask((length, length))
    if causal or window is not None:
        before = None if window is None else window - 1
        mask = _Band((length, length), (before, 0 if causal else before), 0)
    layouts = jax_splash.QKVLayout
    layout = layouts.SEQ_MINOR if tokens_last else layouts.HEAD_DIM_MINOR
    sizes = jax_splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=compute,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=compute,
        block_q_dq=None if fused else block,
        block_kv_dq=None if fused else block,
        use_fused_bwd_kernel=fused,
        q_layout=layout,
        k_layout=layout,
        v_layout=layout,
    )
    with jax.ensure_compile_time_eval():
        kernel = jax_splash.make_splash_mha(
            jax_splash.MultiHeadMask([mask]),  # one for all heads
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=logit_cap,
            save_residuals=save_residuals,
            interpret=interpret,
        )
    return jax.tree.map(np.asarray, kernel)


# ------------------------------------------------------------------------------- private functions of jax

_ARRAYS = ["q", "k", "v", "segment_ids", "sinks", "logsumexp", "do", "di"]
_OPTIONS = {"bq", "bkv", "is_mqa", "interpret", "q_layout", "k_layout", "v_layout"}
_OPTIONS |= {"mask_info", "mask_value", "mask_function", "attn_logits_soft_cap"}
_BACKWARD = {
    "_splash_attention_bwd_dkv": _OPTIONS | {"bkv_compute", "use_fused_bwd_kernel"},
    "_splash_attention_bwd_dq": _OPTIONS,
}


@functools.cache
def _moved() -> str | None:
    """What this release of jax has changed of the private functions that are called here; None if nothing."""
    release = f"jax 0.10 to 0.12 is needed for its splash kernel, got jax {jax.__version__}"
    for name, options in _BACKWARD.items():
        function = getattr(splash_attention_kernel, name, None)
        arguments = list(inspect.signature(function).parameters) if function else []
        if arguments[: len(_ARRAYS)] != _ARRAYS or set(arguments[len(_ARRAYS) :]) != options:
            return f"{release}: {name} has changed"
    if check_vma is None:
        return f"{release}: _check_vma is gone"
    return None


def _differentiate(kernel, q, k, v, segment_ids, log_total, dout, delta):
    """The kernel's own backward pass, which jax calls with a delta that it computes from ``out`` and ``dout``."""
    options = {name: kernel.kwargs[name] for name in ("mask_value", "attn_logits_soft_cap", "mask_function")}
    sizes = kernel.kwargs["block_sizes"]
    options |= dict(is_mqa=False, interpret=kernel.kwargs["interpret"])
    options |= dict(q_layout=sizes.q_layout, k_layout=sizes.k_layout, v_layout=sizes.v_layout)
    arrays = (q, k, v, segment_ids, None, log_total, dout, delta)  # None: no sinks
    dq, dk, dv = splash_attention_kernel._splash_attention_bwd_dkv(
        *arrays,
        bq=sizes.block_q_dkv,
        bkv=sizes.block_kv_dkv,
        bkv_compute=sizes.block_kv_dkv_compute,
        use_fused_bwd_kernel=sizes.use_fused_bwd_kernel,
        mask_info=kernel.dkv_mask_info,
        **options,
    )
    if not sizes.use_fused_bwd_kernel:
        dq = splash_attention_kernel._splash_attention_bwd_dq(
            *arrays, bq=sizes.block_q_dq, bkv=sizes.block_kv_dq, mask_info=kernel.dq_mask_info, **options
        )
    return dq, dk, dv


def _over_batch(function, *arguments) -> list[jax.Array]:
    """Maps a kernel over the batch; the segments, last, may be shared or None."""
    *arrays, segments = arguments
    axis = None if segments is None or segments.shape[0] == 1 else 0
    if segments is not None and axis is None:
        segments = segments[0]
    varying = frozenset().union(*map(varying_axes, jax.tree.leaves(arguments)))
    # The TPU compiler multiplies float32 in either precision, and bfloat16 in the lower.
    is_exact = default_matmul_precision() not in LOW_PRECISION
    precision = "highest" if is_exact and arrays[0].dtype == jnp.float32 else "default"
    # The kernel's index maps need 32-bit integers. Its results name no mesh axes, as `shard_map` otherwise checks.
    with jax.enable_x64(False), check_vma(False), jax.default_matmul_precision(precision):
        results = jax.vmap(function, in_axes=(*[0] * len(arrays), axis))(*arrays, segments)
    return [lax.pcast(x, tuple(varying), to="varying") if varying else x for x in results]

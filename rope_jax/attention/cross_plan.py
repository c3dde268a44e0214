"""Plan of cross-attention: queries and keys of two sequences, each with its own positions."""

import jax
import jax.numpy as jnp

from rope_jax._checks import check_integer, check_mask, shown
from rope_jax.attention.plan import Plan
from rope_jax.attention.plan_arguments import checked_attention_mask, checked_positions, options_of_plan
from rope_jax.attention.rotations import rotations_at
from rope_jax.core.rope import Rope


def make_cross_plan(
    rope: Rope | None,
    shape: tuple[int, int],
    kv_length: int,
    *,
    positions=None,
    kv_positions=None,
    mask=None,
    kv_mask=None,
    attention_mask=None,
    num_heads: int | None = None,
    context_length=None,
    learn_frequencies: bool = False,
) -> Plan:
    """Checks the arguments of a cross-attention and decides what all layers share; see :func:`make_plan`.

    Example:
      >>> import jax, jax.numpy as jnp, rope_jax
      >>> rope = rope_jax.Rope(head_dim=16, schedule=rope_jax.Standard())
      >>> layer = rope_jax.RotaryAttention(num_heads=4, head_dim=16, rope=rope, causal=False)
      >>> x, audio = jnp.ones((2, 5, 64)), jnp.ones((2, 20, 48))
      >>> seconds = dict(positions=jnp.arange(5.0), kv_positions=jnp.arange(20) / 4)
      >>> plan = rope_jax.attention.make_cross_plan(rope, x.shape[:2], audio.shape[1], **seconds)
      >>> layer.init_with_output(jax.random.key(0), x, kv=audio, plan=plan)[0].shape
      (2, 5, 64)

    Args:
      rope: the rope of the layers, or None.
      shape: ``(B, T)``, of the queries.
      kv_length: S.
      positions: of the queries: ``[T]``, ``[B or 1, T]`` or ``[..., T, A]``; required with a rope.
      kv_positions: of the keys, likewise with S for T.
      mask: bool or integer ``[B, T]``, nonzero at real tokens of the queries.
      kv_mask: bool or integer ``[B, S]``, nonzero at real tokens of the keys.
      attention_mask: bool ``[B or 1, N or 1, T or 1, S]``, True if a query may read a key.
      num_heads: N, to check the attention mask.
      context_length: see :func:`make_plan`; required if the schedule depends on it.
      learn_frequencies: whether the layers learn their frequencies, and compute rotations of their own.

    Returns:
      :class:`Plan`.

    Raises:
      ValueError: if a shape is wrong, or positions are missing or given without a rope.
      TypeError: if an array has a dtype of another kind.
    """
    if not isinstance(rope, Rope | None):
        raise TypeError(f"rope must be a Rope or None, got {type(rope).__name__}")
    if not isinstance(shape, tuple) or len(shape) != 2:
        raise ValueError(f"shape must be (B, T), got {shown(shape)}: pass x.shape[:2]")
    num_heads = options_of_plan(num_heads, learn_frequencies)
    if learn_frequencies and context_length is not None:
        raise ValueError(f"context_length must be left out with learned frequencies, got {context_length}")
    batch, length = shape
    if not jax.export.is_symbolic_dim(kv_length):
        check_integer("kv_length", kv_length, least=0)
    lengths = dict(positions=length, kv_positions=kv_length)
    given = dict(positions=positions, kv_positions=kv_positions)
    for name, value in given.items():
        if rope is None and value is not None:
            raise ValueError(f"{name} must be left out without rope: nothing reads them")
        if rope is not None and value is None:
            raise ValueError(
                f"{name} must be given with kv and a rope, got None: the two sequences share no count of tokens"
            )
    facts: dict = {}
    if rope is not None:
        given = {
            name: checked_positions(value, (batch, lengths[name]), rope, None, name)
            for name, value in given.items()
        }
        if not learn_frequencies:
            facts["rotation"], facts["key_rotation"] = (
                rotations_at(rope, value, context_length, None)[0] for value in given.values()
            )
    if attention_mask is not None:
        attention_mask = checked_attention_mask(attention_mask, batch, num_heads, length, kv_length)
    if mask is not None:
        mask = check_mask("mask", mask, "B T", B=batch, T=length)
    if kv_mask is not None:
        kv_mask = check_mask("kv_mask", kv_mask, "B S", B=batch, S=kv_length)
        real = kv_mask[:, None, None, :]
        attention_mask = real if attention_mask is None else attention_mask & real
    index = jnp.arange(length, dtype=jnp.int32)[None]
    return Plan(
        positions=index if rope is None else given["positions"],
        key_positions=given["kv_positions"],
        sequence_index=index,
        mask=mask,
        key_mask=kv_mask,
        attention_mask=attention_mask,
        causal=False,
        ropes=rope,
        kv_length=kv_length,
        **facts,
    )

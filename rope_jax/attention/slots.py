"""Where the tokens of a row lie in a cache: arithmetic on its counters ``[B]``, without keys or values.

Token number n of a row lies in slot n, until the row is full. A full row overflows, unless the cache evicts. With
``eviction="sliding"`` the first ``num_sink_tokens`` slots keep their tokens, and the other slots are a ring: each
new token replaces the oldest of them. With S = 6 slots and 2 sink tokens, a row of 9 tokens is stored as::

    slot    0  1  2  3  4  5
    token   0  1  6  7  8  5

All layers of a model store the same tokens, so that one counter for each row serves the whole stack.
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from rope_jax._checks import check_choice, check_integer, known_any, shown
from rope_jax._jax_internals import Tracer

Eviction = Literal["sliding"]
"""What a full row does: ``"sliding"`` evicts its oldest token. A cache without eviction overflows."""

FREE = np.iinfo(np.int32).max  # the sequence index of a free slot: after every query, so that none reads it
LOST = -1  # num_tokens of an evicting row which overflowed: its real count would look like a valid one


@dataclasses.dataclass(frozen=True)
class Slots:
    """The rule that places tokens in slots, for any row.

    Attributes:
      capacity: S, the slots of a row.
      eviction: None, or ``"sliding"``.
      num_sink_tokens: tokens at the start of a row which are never evicted.
    """

    capacity: int
    eviction: Eviction | None = None
    num_sink_tokens: int = 0

    @property
    def overflow_count(self) -> int:
        """``num_tokens`` of a row which overflowed."""
        return self.capacity + 1 if self.eviction is None else LOST

    def overflowed(self, num_tokens) -> jax.Array:
        """bool ``[B]``: rows which overflowed, by their counter."""
        return num_tokens > self.capacity if self.eviction is None else num_tokens < 0

    def of_new_tokens(self, num_tokens, real) -> jax.Array:
        """The slot of each new token, after ``num_tokens [B]``: int32 ``[B, T]``.

        Tokens that are not ``real [B, T]`` get slot S, which no row has: a write drops them. A write also drops a
        token past the end of a row.
        """
        slot = num_tokens[:, None] + jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
        if self.eviction is not None:
            ring = self.capacity - self.num_sink_tokens
            in_ring = self.num_sink_tokens + (slot - self.num_sink_tokens) % ring
            slot = jnp.where(slot < self.num_sink_tokens, slot, in_ring)
        return jnp.where(real, slot, self.capacity)

    def consecutive(self, mask) -> bool:
        """Whether the new tokens of a row go to consecutive slots: no gaps by a mask, and no ring."""
        return mask is None and self.eviction is None

    def sequence_index(self, num_tokens) -> jax.Array:
        """The sequence index of the token in each slot, after ``num_tokens [B]``: int32 ``[B or 1, S]``.

        Free slots sort after every query, so that no query reads them.
        """
        slot = jnp.arange(self.capacity, dtype=jnp.int32)[None]
        if self.eviction is None:
            return slot  # the free slots of a row come after its last token
        last = num_tokens[:, None] - 1
        # Tokens n, n + ring, n + 2 ring, ... share a slot, and the slot holds the latest that the row was given.
        latest = last - (last - slot) % (self.capacity - self.num_sink_tokens)
        index = jnp.where(slot < self.num_sink_tokens, slot, latest)
        return jnp.where((slot <= last) & (index >= slot), index, jnp.int32(FREE))

    def positions(self, num_tokens) -> jax.Array:
        """The position of the key in each slot, after ``num_tokens [B]``: int32 ``[B or 1, S]``.

        Sink tokens move along with the window: they stand right before the oldest recent token, so that distances
        never exceed the capacity (Xiao et al. 2023, section 3.2).
        """
        index = self.sequence_index(num_tokens)
        if not self.num_sink_tokens:
            return index
        evicted = jnp.maximum(num_tokens[:, None] - self.capacity, 0)
        return index + jnp.where(index < self.num_sink_tokens, evicted, 0)

    def advance(
        self, argument: str, num_tokens, tokens: int, real=None, *, max_window: int | None = None
    ) -> jax.Array:
        """``num_tokens [B]`` after T more tokens, or after the ``real [B, T]`` tokens among them.

        A row overflows if its tokens do not fit. An evicting row overflows if several tokens come at once, and the
        last would evict a key that the first still needs. Without sink tokens, n tokens fit if ``n - 1 + max_window
        <= S``.

        Raises:
          ValueError: if a row is known at trace time to overflow.
        """
        count = tokens if real is None else jnp.sum(real, axis=-1, dtype=jnp.int32)
        after = num_tokens + count
        if self.eviction is None:
            counter = after
        else:
            lost = (after > self.capacity) & (after - num_tokens > 1)
            if self.num_sink_tokens == 0 and max_window is not None:
                lost &= after - num_tokens - 1 + max_window > self.capacity
            counter = jnp.where(lost | (num_tokens < 0), LOST, after)
        # A symbolic T or S (jax.export) cannot be compared; it is left to run time like a traced counter.
        are_known = isinstance(tokens, int) and isinstance(self.capacity, int)
        too_many = real is None and are_known and tokens > self.capacity
        if too_many or known_any(self.overflowed(counter)):
            have = "" if isinstance(after, Tracer) else f", rows would hold {after.tolist()}"
            hint = "" if self.eviction is None else ": this write would evict keys that its first token still needs"
            raise ValueError(
                f"{argument} must fit in the cache: T={tokens} tokens were given, capacity S={self.capacity}"
                f"{have}{hint}"
            )
        return counter


def check_capacity(capacity, least: int | None = None) -> None:
    """Raises unless S is an integer of at least ``least``, and a row of S + 1 tokens is counted in int32."""
    if jax.export.is_symbolic_dim(capacity):
        return
    if check_integer("capacity", capacity, least=least) >= jnp.iinfo(jnp.int32).max:
        raise ValueError(f"capacity must be below 2^31 - 1, got {shown(capacity)}")


def checked_slots(capacity: int, eviction: Eviction | None, num_sink_tokens: int) -> Slots:
    """The rule, if its fields go together.

    Raises:
      TypeError: if num_sink_tokens is not an integer.
      ValueError: if eviction is unknown, or sink tokens leave no room or come without eviction.
    """
    check_choice("eviction", eviction, get_args(Eviction), optional=True)
    num_sink_tokens = check_integer("num_sink_tokens", num_sink_tokens, least=0)
    if num_sink_tokens and eviction is None:
        raise ValueError(
            f"num_sink_tokens must be 0 without eviction, got {num_sink_tokens}: pass eviction='sliding'"
        )
    if not jax.export.is_symbolic_dim(capacity) and num_sink_tokens >= capacity:
        raise ValueError(f"num_sink_tokens must be below the capacity S={capacity}, got {num_sink_tokens}")
    return Slots(capacity, eviction, num_sink_tokens)

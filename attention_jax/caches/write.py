"""`write_heads`: the update of a key-value cache, in place in a compiled loop."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def write_heads(held_BKSH: jax.Array, new_BTKH: jax.Array, slots_BT: jax.Array) -> jax.Array:
    """The array with the last T tokens of `new` in their slots; those >= S are dropped.

    A ring gives the array that its queries read, old keys and new ones: reading the new from there orders
    that before the write, without which XLA would copy the ring.

    One turn of a loop writes the tokens of a row whose slots follow one another: all tokens of the row, as
    long as a ring does not wrap. XLA's CPU backend runs such a loop in place, because its number of turns
    depends on the data. It copies the whole array for a scatter that is not along the leading axes, and fuses
    a single update with what reads the array, on a copy.
    """
    (B, T), (_, K, S, H) = slots_BT.shape, held_BKSH.shape
    W, R, before = min(T, S), B * T, new_BTKH.shape[1] - T
    new_BTKH, slots_BT = jnp.asarray(new_BTKH, held_BKSH.dtype), jnp.asarray(slots_BT, jnp.int32)
    offsets_BT = jnp.where(slots_BT < S, slots_BT - jnp.arange(T, dtype=jnp.int32)[None], S)  # S: not written
    before_BT = jnp.pad(offsets_BT[:, :-1], ((0, 0), (1, 0)), constant_values=S)
    starts_R = ((offsets_BT < S) & (offsets_BT != before_BT)).reshape(R)
    index_R, zero = jnp.arange(R, dtype=jnp.int32), jnp.int32(0)

    def write(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        i, held_BKSH = carry
        b, offset = i // T, offsets_BT[i // T, i % T]
        slot = jnp.minimum(slots_BT[b, i % T], S - W)
        column_W = slot - offset + jnp.arange(W, dtype=jnp.int32)  # the token of each slot
        new_KWH = new_BTKH[b].at[before + column_W].get(mode="clip").swapaxes(0, 1)
        place = (b, zero, slot, zero)
        old_1KWH = jax.lax.dynamic_slice(held_BKSH, place, (1, K, W, H))
        offset_W = offsets_BT[b].at[column_W].get(mode="fill", fill_value=S, wrap_negative_indices=False)
        mine_W = offset_W == offset
        new_1KWH = jnp.where(mine_W[None, None, :, None], new_KWH[None], old_1KWH)
        following = jnp.where(starts_R & (index_R > i), index_R, R).min()
        return following, jax.lax.dynamic_update_slice(held_BKSH, new_1KWH, place)

    first = jnp.where(starts_R, index_R, R).min()
    return jax.lax.while_loop(lambda carry: carry[0] < R, write, (first, held_BKSH))[1]

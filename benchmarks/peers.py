"""The formats of other 8-bit optimizers for Adam's moments, written from their papers.

FlashOptim: [arXiv:2602.23349](https://arxiv.org/abs/2602.23349). Groups of 32 elements share a
float16 scale. mu is companded, nu is kept as its square root; both are rounded to nearest.

bitsandbytes: [Dettmers et al.](https://arxiv.org/abs/2110.02861). Blocks of 256 elements share a
float32 scale, their largest magnitude. A code stands for one of 256 numbers in [-1, 1], or in
[0, 1] for nu, which are closer together the smaller they are (a "dynamic tree"); moments are
rounded to nearest.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class Scaled(NamedTuple):
    """Codes shaped like the moment, and a scale for each group of consecutive elements."""

    codes: jax.Array
    scales: jax.Array  # (groups, 1)


class Codec(NamedTuple):
    """A function that encodes a moment, and one that decodes it to float32."""

    encode: Callable[[jax.Array], Scaled]
    decode: Callable[[Scaled], jax.Array]


def codec(
    group: int,
    scale_dtype: type,
    to_codes: Callable[[jax.Array], jax.Array],
    from_codes: Callable[[jax.Array], jax.Array],
) -> Codec:
    """Returns a codec that divides each group by its largest magnitude and encodes the quotients.

    The number of elements must be a multiple of `group`.
    """

    def encode(x: jax.Array) -> Scaled:
        groups = x.reshape(-1, group)
        scales = jnp.max(jnp.abs(groups), axis=1, keepdims=True)
        codes = to_codes(groups / jnp.where(scales == 0, 1, scales))
        return Scaled(codes.reshape(x.shape), scales.astype(scale_dtype))

    def decode(stored: Scaled) -> jax.Array:
        groups = from_codes(stored.codes.reshape(-1, group))
        return (groups * stored.scales.astype(jnp.float32)).reshape(stored.codes.shape)

    return Codec(encode, decode)


def nearest(x: jax.Array) -> jax.Array:
    """Returns the nearest whole number; halves go up."""
    return jnp.floor(x + 0.5)


def companded() -> Codec:
    """Returns FlashOptim's codec for mu: x of [-1, 1] as 127 * 2x / (1 + |x|)."""

    def to_codes(x: jax.Array) -> jax.Array:
        return nearest(127 * (2 * x / (1 + jnp.abs(x)))).astype(jnp.int8)

    def from_codes(codes: jax.Array) -> jax.Array:
        y = codes.astype(jnp.float32) / 127
        return y / (2 - jnp.abs(y))

    return codec(32, jnp.float16, to_codes, from_codes)


def square_root() -> Codec:
    """Returns FlashOptim's codec for nu: its square root x of [0, 1] as 255x."""
    root = codec(
        32,
        jnp.float16,
        lambda x: nearest(255 * x).astype(jnp.uint8),
        lambda codes: codes.astype(jnp.float32) / 255,
    )
    return Codec(
        lambda nu: root.encode(jnp.sqrt(nu)), lambda stored: jnp.square(root.decode(stored))
    )


def dynamic_tree(signed: bool) -> Codec:
    """Returns bitsandbytes' codec: each x as the index of the nearest value of the tree."""
    values = tree_values(signed)
    middles = (values[1:] + values[:-1]) / 2

    def to_codes(x: jax.Array) -> jax.Array:
        return jnp.searchsorted(jnp.asarray(middles), x).astype(jnp.uint8)

    return codec(256, jnp.float32, to_codes, lambda codes: jnp.asarray(values)[codes])


def tree_values(signed: bool) -> np.ndarray:
    """Returns the 256 values of the dynamic tree, in order.

    They are the middles of equal parts of seven decades [10^-k / 10, 10^-k]; each decade has half
    as many parts as the one above it. Then come 0 and 1, and if signed the negatives without -1.
    """
    decades = []
    for k in range(7):
        parts = 2 ** (6 - k if signed else 7 - k)
        decades.append(10.0**-k * (0.1 + 0.9 * (np.arange(parts) + 0.5) / parts))
    positive = np.concatenate(decades)
    negative = -positive if signed else []
    return np.sort(np.concatenate([positive, negative, [0, 1]])).astype(np.float32)


def scale_by_adam(
    mu: Codec, nu: Codec, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Returns Adam's direction for one leaf, with its moments in these codecs.

    As in both packages, a step decodes the moments, updates them in float32, uses them, and only
    then encodes them.
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        zeros = jnp.zeros(params.shape, jnp.float32)
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), mu.encode(zeros), nu.encode(zeros))

    def update(
        updates: Any, state: Any, params: Any = None
    ) -> tuple[jax.Array, optax.ScaleByAdamState]:
        del params
        count = state.count + 1
        t = count.astype(jnp.float32)
        m = b1 * mu.decode(state.mu) + (1 - b1) * updates
        v = b2 * nu.decode(state.nu) + (1 - b2) * jnp.square(updates)
        m_hat = m / -jnp.expm1(t * np.log(b1).astype(np.float32))
        v_hat = v / -jnp.expm1(t * np.log(b2).astype(np.float32))
        direction = m_hat / (jnp.sqrt(v_hat) + eps)
        return direction, optax.ScaleByAdamState(count, mu.encode(m), nu.encode(v))

    return optax.GradientTransformation(init, update)


def flashoptim(eps: float) -> optax.GradientTransformation:
    """Returns Adam with FlashOptim's moments: 2.125 bytes per parameter."""
    return scale_by_adam(companded(), square_root(), eps=eps)


def bitsandbytes(eps: float) -> optax.GradientTransformation:
    """Returns Adam with bitsandbytes' 8-bit moments: 2.03 bytes per parameter."""
    return scale_by_adam(dynamic_tree(signed=True), dynamic_tree(signed=False), eps=eps)

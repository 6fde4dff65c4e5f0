"""Makes one leaf's step, from its gradient and stored moments to its update and new moments."""

# Annotations stay text: cloudpickle then has no types to pickle along with a function.
from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, reshard
from jax.typing import DTypeLike

from adam_jax._codec import Codec, Moments, Rows, Stored, unit_of_mu
from adam_jax._moments import real_dtype, saturate
from adam_jax._rounding import Draw
from adam_jax._sharding import varying
from adam_jax._types import Leaf, RealLeaf


class IdleTerms(NamedTuple):
    """The direction of a step without a gradient, mu weight / (max(root, floor) + eps).

    mu and root are those before the first such step.
    """

    weight: RealLeaf
    eps: RealLeaf
    floor: RealLeaf | None = None


class Idle(NamedTuple):
    """What a variant of Adam does in steps without a gradient, many of which it can make at once.

    `p1` and `p2` are the powers b1^j and b2^j after j such steps.
    """

    root: Callable[[Moments], RealLeaf]  # sqrt(nu), or the variant's replacement for it
    terms: Callable[[Any, RealLeaf, RealLeaf], IdleTerms]  # (scalars at the step, p1, p2)
    advance: Callable[[Moments, RealLeaf, RealLeaf, Any], Moments]  # (moments, p1, p2, scalars)
    ratio: Callable[[float, float], float]  # (b1, b2) -> how much a direction shrinks in a step


class Algorithm(NamedTuple):
    """A variant of Adam, as one leaf sees it."""

    # All are module-level functions, never closures, because jit caches by their identity.
    scalars: Callable[..., Any]  # (count, **hyperparameters) -> the numbers that leaves share
    advance: Callable[[Leaf, Moments, Any], Moments]  # (gradient, moments, scalars) -> new moments
    direction: Callable[[Leaf, Moments, Any], Leaf]  # (gradient, new moments, scalars)
    idle: Idle


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["tree"])
@dataclasses.dataclass(frozen=True)
class Scalars:
    """A tree of scalars as one array, which gives each leaf's step one argument instead of a dozen.

    The time to trace, lower and dispatch a call grows with its arguments. The compiler takes the
    array apart again.
    """

    values: jax.Array
    tree: Any  # its jax.tree_util.PyTreeDef

    @functools.partial(jax.jit, static_argnums=1)
    def unpack(self, dtype: DTypeLike) -> Any:
        """Returns the tree."""
        return self.tree.unflatten(self.values.astype(dtype))


@functools.partial(jax.jit, static_argnums=(0, 3))
def scalars_of(
    scalars: Callable[..., Any], hyperparameters: dict[str, Any], count: jax.Array, coded: bool
) -> Scalars:
    """Returns the numbers that all leaves' steps share: the algorithm's scalars and mu's unit."""
    dtype = jnp.result_type(float)
    hyperparameters = jax.tree.map(
        lambda x: x if x.dtype == bool else x.astype(dtype),
        jax.tree.map(jnp.asarray, hyperparameters),
    )
    t = count.astype(dtype)
    unit = unit_of_mu(hyperparameters["b1"], hyperparameters["b2"], t) if coded else 0.0
    leaves, tree = jax.tree.flatten((scalars(t, **hyperparameters), unit))
    return Scalars(jnp.stack([jnp.asarray(x, dtype) for x in leaves]), tree)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def leaf_step(
    algorithm: Algorithm,
    codec: Codec,
    sharding: NamedSharding | None,
    gradient: Leaf,
    stored: Stored,
    scalars: Scalars,
    draw: Draw | None,
    param: Leaf | None,
    learning_rate: jax.Array | None,
    weight_decay: jax.Array | None,
) -> tuple[Leaf, Stored]:
    """Returns one leaf's update, sharded as its moments or as `sharding` says, and new moments.

    It is jitted by itself: traced once per shape, and one call in eager use.
    """
    wide = codec.arithmetic_dtype(gradient.dtype)
    # Complex leaves meet real scalars, which JAX's strict promotion mode would not allow.
    with jax.numpy_dtype_promotion("standard"):
        s, unit = scalars.unpack(real_dtype(wide))
        g = gradient
        if codec.random:
            # Stochastic rounding is a step function: derivatives end here.
            g, stored = jax.lax.stop_gradient((g, stored))
        sealed = rows = stored.rows
        opened = codec.opened(rows, unit.dtype)
        if codec.coded:
            sealed, rows = _new_rows(algorithm, codec, g.astype(wide), opened, s, unit)
        new, moments = _in_one_pass(algorithm, codec, (g, stored, opened, rows, draw, s))
        # The direction uses the moments as they are stored, so a step depends on the state alone.
        update = algorithm.direction(_saturated(gradient, codec), moments, s)
        if weight_decay is not None and param is not None:
            update = update + weight_decay.astype(unit.dtype) * param.astype(wide)
        if sharding is not None and update.dtype == gradient.dtype:
            # Before the last product: a compiler may fuse that product with the user's sum of
            # parameter and update, and now it does so wherever the moments lie.
            update = reshard(update, sharding)
        if learning_rate is not None:
            # Last: multiplying rate and scale first would save a multiplication, but tiny moments
            # would underflow when multiplied by that product.
            update = -learning_rate.astype(unit.dtype) * update
    update = update.astype(gradient.dtype)
    if sharding is not None:
        update = reshard(update, sharding)
    return update, new._replace(rows=sealed)


def _saturated(gradient: Leaf, codec: Codec) -> Leaf:
    """Returns the gradient in the arithmetic's dtype, small enough to have finite squares.

    The squares are finite in each of the codec's dtypes.
    """
    wide = codec.arithmetic_dtype(gradient.dtype)
    # Where rows have a scale, the scale carries infinity and NaN.
    return saturate(gradient.astype(wide), codec.narrowest, passing=not codec.nu_is_coded)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _advanced(
    algorithm: Algorithm,
    codec: Codec,
    gradient: Leaf,
    stored: Stored,
    opened: Rows,
    rows: Rows,
    draw: Draw | None,
    s: Any,
) -> tuple[Stored, Moments]:
    """Returns new moments, stored and as numbers."""
    g = _saturated(gradient, codec)
    moments = codec.read(stored, opened, real_dtype(g.dtype))
    return codec.write(algorithm.advance(g, moments, s), stored, rows, draw)


def _new_rows(
    algorithm: Algorithm, codec: Codec, gradient: Leaf, old: Rows, s: Any, unit: RealLeaf
) -> tuple[Rows, Rows]:
    """Returns the scales and units of the new codes, sealed and opened.

    They are known before the codes are. A row that was NaN stays NaN.
    """
    if not codec.nu_is_coded:
        return sealed_rows(codec, None, old, unit)
    # The average of each row's largest gradient, with the weights of nu: at least its largest nu.
    largest = _largest(gradient, codec.narrowest)
    # In `jax.shard_map`, the maximum is also over the mesh axes that divide the rows.
    if divided := varying(jax.typeof(largest)) - varying(jax.typeof(old.scale)):
        largest = jax.lax.pmax(largest, tuple(divided))
    _, scale = algorithm.advance(largest, (jnp.zeros_like(old.scale), old.scale), s)
    return sealed_rows(codec, scale, old, unit)


def sealed_rows(
    codec: Codec, scale: RealLeaf | None, old: Rows, unit: RealLeaf
) -> tuple[Rows, Rows]:
    """Returns rows with a scale, sealed and opened, given mu's unit in roots of the scale."""
    if scale is None:
        return codec.sealed(None, jnp.where(jnp.isnan(old.unit), old.unit, unit), old)
    root = jnp.sqrt(jnp.maximum(scale, jnp.finfo(scale.dtype).tiny))
    return codec.sealed(scale, unit * root, old)


def check_shard_map() -> None:
    """Raises ValueError in a `jax.shard_map` that does not track what varies over its axes."""
    axes = jax.sharding.get_abstract_mesh().manual_axes
    if axes and not varying(jax.typeof(jax.lax.axis_index(axes[0]))):
        raise ValueError(
            "moments in int8 have one scale for each row, but jax.shard_map(check_vma=False) does "
            f"not record which of the axes {', '.join(axes)} divide the rows. Leave check_vma at "
            "True."
        )


def _largest(gradient: Leaf, narrowest: DTypeLike) -> RealLeaf:
    """Returns each row's largest saturated magnitude, or NaN if the row has one.

    As integers, the bit patterns of nonnegative numbers are ordered like the numbers, and those
    of NaN come last. A maximum of floats in which XLA for CPU uses vectors would lose NaN.
    """
    is_complex = jnp.iscomplexobj(gradient)
    magnitude = jnp.abs(saturate(gradient, narrowest) if is_complex else gradient)
    if is_complex:  # a rounded root, whose square must not be less than the sum of squares
        magnitude = magnitude * (1 + 4 * jnp.finfo(magnitude.dtype).eps)
    word = f"int{jnp.finfo(magnitude.dtype).bits}"
    pattern = jnp.max(jax.lax.bitcast_convert_type(magnitude, word), axis=-1, keepdims=True)
    largest = jax.lax.bitcast_convert_type(pattern, magnitude.dtype)
    return largest if is_complex else saturate(largest, narrowest)


def _in_one_pass(
    algorithm: Algorithm,
    codec: Codec,
    args: tuple[Leaf, Stored, Rows, Rows, Draw | None, Any],
) -> tuple[Stored, Moments]:
    """Returns the result of `_advanced`, computed in the form that each compiler needs.

    XLA for CPU makes one pass for each output of a step. In each of them it would decode, average
    and encode again, with copies of the old moments for the later passes. It does not look through
    a condition, even one that always holds, so the step is inside one and only its codes come out.
    XLA for TPU makes one pass of a step if everything after it starts from the codes. XLA for GPU
    does so anyway, and continues more cheaply from the values.
    """
    advanced = functools.partial(_advanced, algorithm, codec)
    gradient, _, _, rows, draw, _ = args
    if draw is None or not codec.coded:
        return advanced(*args)
    always = draw.factor > 0  # it is odd
    dtype = real_dtype(codec.arithmetic_dtype(gradient.dtype))

    def and_moments(stored: Stored, rows: Rows) -> tuple[Stored, Moments]:
        return stored, codec.read(stored, rows, dtype)

    def on_cpu(*args: Any) -> tuple[Stored, Moments]:
        joined = jax.lax.cond(
            always,
            lambda *args: codec.joined(advanced(*args)[0]),
            lambda gradient, stored, *_: codec.joined(stored),
            *args,
        )
        return and_moments(codec.parted(joined), rows)

    return jax.lax.platform_dependent(
        *args,
        cpu=on_cpu,
        tpu=lambda *args: and_moments(advanced(*args)[0], rows),
        default=advanced,
    )

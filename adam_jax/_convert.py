"""Converts the state of a training run from one storage format to another."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adam_jax._checks import check_moments, check_real, leaf_path
from adam_jax._codec import Codec, Moments, Rows, Stored, codec_of, unit_of_mu
from adam_jax._master_weights import (
    MasterWeightsState,
    load_master_params,
    master_params,
    remainders_of_group,
)
from adam_jax._moments import Decay, real_dtype, sqrt
from adam_jax._rounding import Draw, draws
from adam_jax._sharding import fetched, in_memory_of
from adam_jax._state import (
    WITH_MOMENTS,
    leaves_of,
    map_states,
    only_state,
    per_leaf,
    states_with_moments,
    unaliased,
    with_leaves,
)
from adam_jax._storage import MAXIMUM, initial, storage_formats
from adam_jax._types import RealLeaf, StorageFormats, Word


def convert_state(
    state: Any, mu_dtype: StorageFormats = None, nu_dtype: StorageFormats = None
) -> Any:
    """Converts the moments in an optimizer state to other storage formats.

    An optimizer made with these `mu_dtype` and `nu_dtype` can continue from the result. States of
    `optax.adam`, with any `mu_dtype`, are accepted too. Moments are rounded as a step rounds them:
    stochastically in bfloat16 and int8. In int8 a row's scale starts as its largest nu. Leaves that
    already have the requested format stay unchanged. A tree of formats converts each group of
    `optax.multi_transform` to its own.

    Args:
        state: an optimizer state with states of `scale_by_adam`, `scale_by_amsgrad` or
            `scale_by_adamax` in it, at any depth; the rest is returned unchanged.
        mu_dtype: the new format of mu: `"float32"`, `"bfloat16"`, `"int8"`, None for the default of
            `adam`, or a tree of these that is a prefix of the parameters.
        nu_dtype: the new format of nu, likewise; for AMSGrad that of nu_max too.

    Returns:
        A state of the same types. The moments keep their shapes and have the dtypes of the new
        formats; in int8, nu is an `Int8Moment`.

    Raises:
        ValueError: for an unknown storage format, for AMSGrad's nu in int8, and for a state without
            moments.
        TypeError: for a moment in a dtype that no format has, and for a complex mu in bfloat16 or
            int8, naming the path.

    Examples:
        >>> import adam_jax, jax.numpy as jnp
        >>> params = jnp.ones((64, 64))
        >>> state = adam_jax.adam(1e-3).init(params)
        >>> state = adam_jax.convert_state(state, mu_dtype="int8", nu_dtype="int8")
        >>> state[0].mu.dtype
        dtype('int8')
    """
    states_with_moments(state)  # there must be one
    converted = map_states(lambda x: _converted(x, mu_dtype, nu_dtype), WITH_MOMENTS, state)
    return unaliased(converted, state)


def convert_remainder(params: optax.Params, state: Any, remainder: str) -> tuple[optax.Params, Any]:
    """Converts the remainders of `master_weights` to another format, with the same float32 weights.

    An optimizer made by `master_weights` with this `remainder` can continue from the result. More
    bits lose nothing. With fewer bits, weights are rounded to nearest, as `load_master_params`
    rounds them: a parameter moves by an ulp where its remainder rounds up to a whole one.

    Args:
        params: the current parameters.
        state: an optimizer state with one `master_weights` state in it, at any depth.
        remainder: `"none"`, `"int8"`, `"int16"` or `"float32"`.

    Returns:
        The parameters, in their dtypes, and the state, in which only the remainders are new.

    Raises:
        ValueError: for another `remainder`, and if there is no such state, or more than one.

    Examples:
        >>> import adam_jax, jax.numpy as jnp
        >>> params = jnp.ones(3, jnp.bfloat16)
        >>> state = adam_jax.master_weights(adam_jax.adam(1e-3), "int8").init(params)
        >>> params, state = adam_jax.convert_remainder(params, state, "int16")
        >>> state.remainder.dtype
        dtype('int16')
    """
    old = only_state(MasterWeightsState, "master_weights", state)
    new = old._replace(remainder=remainders_of_group(params, old, remainder))
    state_without = map_states(lambda _: new, MasterWeightsState, state)
    return load_master_params(master_params(params, state), params, state_without)


def _converted(state: Any, mu_dtype: StorageFormats, nu_dtype: StorageFormats) -> Any:
    """Returns one state with moments, converted to other formats."""
    is_amsgrad = isinstance(state, optax.ScaleByAmsgradState)
    not_int8 = f"nu_max {MAXIMUM}" if is_amsgrad else None
    mu_formats = per_leaf(
        "mu_dtype", storage_formats("mu_dtype", mu_dtype), state.mu, none_is_a_value=True
    )
    nu_formats = per_leaf(
        "nu_dtype",
        storage_formats("nu_dtype", nu_dtype, not_int8=not_int8),
        state.mu,
        none_is_a_value=True,
    )
    stored = leaves_of(state, state.mu)
    [count] = jax.tree.leaves(state.count)  # Flax may have put the count into a box
    count = jnp.asarray(count)
    leaves = []
    for i, (leaf, draw) in enumerate(zip(stored, draws(len(stored), count), strict=True)):
        if leaf.mu is not None:
            path = functools.partial(leaf_path, state.mu, i)
            check_moments(path, leaf, state._fields[1:])
            check_real(path, leaf.mu, mu_formats[i])
            new = _converted_leaf(fetched(leaf), mu_formats[i], nu_formats[i], draw, count)
            leaf = jax.tree.map(functools.partial(in_memory_of, leaf.mu), new)
        leaves.append(leaf)
    int8 = "int8" in [*mu_formats, *nu_formats]
    return with_leaves(state, leaves, state.mu, int8=int8)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _converted_leaf(
    stored: Stored, mu: str | None, nu: str | None, draw: Draw, count: Word
) -> Stored:
    # optax has a complex nu for a complex parameter, with imaginary parts of 0.
    others = tuple(x.real for x in stored.others)
    stored = stored._replace(nu=stored.nu.real, others=others)
    codec = codec_of(stored)
    dtype = real_dtype(codec.arithmetic_dtype(np.float32))
    with jax.numpy_dtype_promotion("standard"):
        numbers = codec.read(stored, codec.opened(stored.rows, dtype), dtype)
    like = initial(numbers[0], mu, nu, len(others))
    if codec_of(like) == codec:  # encoding again could turn a number into its neighbour
        return stored if stored.rows.unit is not None else stored._replace(rows=like.rows)
    return written(numbers, like, draw, count)


@jax.jit
def written(numbers: Moments, like: Stored, draw: Draw, count: Word) -> Stored:
    """Returns one leaf's moments, given as numbers, in the format of another stored leaf."""
    codec = codec_of(like)
    m, v, *others = numbers
    with jax.numpy_dtype_promotion("standard"):
        # Where moments are too large for a narrower dtype, this preserves their ratio.
        limit = np.array(jnp.finfo(codec.narrowest).max / 4, v.dtype)
        factor = jnp.sqrt(limit / jnp.maximum(v, limit))
        m, v, *others = m * factor, *(jnp.minimum(x, limit) for x in (v, *others))
        sealed = rows = like.rows
        if codec.coded:
            sealed, rows = _rows(codec, m, v, rows, count)
        stored, _ = codec.write((m, v, *others), like, rows, draw)
    return stored._replace(rows=sealed)


def _rows(codec: Codec, m: RealLeaf, v: RealLeaf, like: Rows, count: Word) -> tuple[Rows, Rows]:
    """Returns scales and units that cut nothing off, sealed and opened."""
    t = jnp.maximum(count, 1).astype(v.dtype)
    unit = unit_of_mu(Decay.of(0.9), Decay.of(0.999), t)
    scale = root = jnp.ones((), v.dtype)
    if codec.nu_is_coded:
        scale = jnp.max(v, axis=-1, keepdims=True)
        root = jnp.sqrt(jnp.maximum(scale, jnp.finfo(scale.dtype).tiny))
    # Betas other than the defaults may have made mu larger. q lies between 1/2 and 1 times
    # unit sqrt(nu), and rounding nu may halve it.
    ratio = jnp.abs(m) / sqrt(v)
    largest = jnp.max(ratio, axis=-1, keepdims=True, initial=0) / (7.75 / 4)
    unit = jnp.clip(largest, unit, 16 * unit) * root
    return codec.sealed(scale if codec.nu_is_coded else None, unit, like)

"""Moving a running training from one storage format to another."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adam_jax import _storage
from adam_jax._amsgrad import NU_MAX_IS_A_MAXIMUM
from adam_jax._checks import WITH_MOMENTS, only_state, states_with_moments
from adam_jax._master_weights import (
    MasterWeightsState,
    load_master_params,
    master_params,
    no_remainders,
    replaced_state,
)
from adam_jax._moments import real_dtype
from adam_jax._storage import Draw, Moment, Moments, Stored
from adam_jax._types import StorageFormat


def convert_state(
    state: Any, mu_dtype: StorageFormat = None, nu_dtype: StorageFormat = None
) -> Any:
    """The same optimizer state with its moments stored in other formats.

    What it returns is what an optimizer made with these `mu_dtype` and `nu_dtype` goes on from;
    states of `optax.adam`, with whatever `mu_dtype`, are accepted too. They are rounded as a step
    rounds them, in bfloat16 and int8 at random. In int8 a row's scale starts as its largest nu.
    Leaves that are in their formats already stay as they are.

    Args:
        state: an optimizer state with states of `scale_by_adam`, `scale_by_amsgrad` or
            `scale_by_adamax` in it, at any depth; the rest is returned as it is.
        mu_dtype: as in `adam`.
        nu_dtype: as in `adam`; for AMSGrad that of v_max too.

    Returns:
        A state of the same types. Arrays of moments keep their shapes and have the dtypes of the
        new formats; in int8, nu is an `Int8Moment`.

    Raises:
        ValueError: for an unknown storage format, for AMSGrad's nu in int8, and for a state
            without moments.

    Examples:
        >>> import adam_jax, jax.numpy as jnp
        >>> params = jnp.ones((64, 64))
        >>> state = adam_jax.adam(1e-3).init(params)
        >>> state = adam_jax.convert_state(state, mu_dtype="int8", nu_dtype="int8")
        >>> state[0].mu.dtype
        dtype('int8')
    """
    mu = Moment(_storage.storage_format("mu_dtype", mu_dtype), real=False)
    nu = Moment(_storage.storage_format("nu_dtype", nu_dtype), real=True)
    states_with_moments(state)  # there must be one
    return jax.tree.map(
        lambda x: converted(x, mu, nu) if has_moments(x) else x, state, is_leaf=has_moments
    )


def convert_remainder(params: optax.Params, state: Any, remainder: str) -> tuple[optax.Params, Any]:
    """The same float32 weights, kept in another kind of remainder.

    What it returns is what `master_weights` made with this `remainder` goes on from. With more bits
    nothing is lost. With fewer, weights are rounded to nearest, as `load_master_params` does it: a
    parameter moves by an ulp where its remainder rounds up to the next one.

    Args:
        params: the current parameters.
        state: an optimizer state with one `master_weights` state in it, at any depth.
        remainder: `"none"`, `"int8"`, `"int16"` or `"float32"`.

    Returns:
        The parameters, in their dtypes, and the state; but for the remainders it is the same.

    Raises:
        ValueError: for another `remainder`, and when there is no such state, or more than one.

    Examples:
        >>> import adam_jax, jax.numpy as jnp
        >>> params = jnp.ones(3, jnp.bfloat16)
        >>> state = adam_jax.master_weights(adam_jax.adam(1e-3), "int8").init(params)
        >>> params, state = adam_jax.convert_remainder(params, state, "int16")
        >>> state.remainder.dtype
        dtype('int16')
    """
    old = only_state(MasterWeightsState, "master_weights", state)
    new = old._replace(remainder=no_remainders(params, remainder))
    return load_master_params(master_params(params, state), params, replaced_state(state, new))


def has_moments(x: Any) -> bool:
    """Whether this is a state of `scale_by_adam`, `scale_by_amsgrad` or `scale_by_adamax`."""
    return isinstance(x, WITH_MOMENTS)


def converted(state: Any, mu: Moment, nu: Moment) -> Any:
    """One state that has moments, with these in other formats."""
    if isinstance(state, optax.ScaleByAmsgradState):
        _storage.storage_format("nu_dtype", nu.format, not_int8=NU_MAX_IS_A_MAXIMUM)
    treedef, count = jax.tree.structure(state.mu), jnp.asarray(state.count)
    moments = {name: mu if name == "mu" else nu for name in state._fields if name != "count"}
    columns = [
        _storage.to_leaves(getattr(state, name), lambda tree, _: treedef.flatten_up_to(tree))
        for name in moments
    ]
    leaves = []
    for i, stored in enumerate(zip(*columns, strict=True)):
        numbers = _storage.load(stored, jnp.float32, count)
        # optax has a complex nu for a complex parameter, with imaginary parts of 0.
        pairs = zip(moments.values(), numbers, strict=True)
        numbers = cast(Moments, tuple(x.real if moment.real else x for moment, x in pairs))
        like = cast(Stored, tuple(map(_storage.zeros, moments.values(), numbers)))
        if _dtypes(like) == _dtypes(stored):
            leaves.append(stored)  # encoded anew, a number may become its neighbour
            continue
        scale = None
        if _storage.scale_of(like, real_dtype(numbers[0].dtype)) is not None:
            scale = jnp.max(numbers[1], axis=-1, keepdims=True)
        encoded, _ = _storage.encode(numbers, like, scale, Draw(np.uint32(i), count))
        leaves.append(_storage.unpack(encoded, like, scale))
    trees = {
        name: _storage.to_tree([leaf[k] for leaf in leaves], treedef.unflatten, moment)
        for k, (name, moment) in enumerate(moments.items())
    }
    return state._replace(**trees)


def _dtypes(stored: Stored) -> list[Any]:
    return [x.dtype for x in jax.tree.leaves(stored)]

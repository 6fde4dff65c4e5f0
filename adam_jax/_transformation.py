"""From the arithmetic of one leaf to an optax gradient transformation over a tree.

An `Algorithm` says what happens to one leaf. This module walks the trees, checks them, reads
and writes the stored moments, and does the rest of a step (decoupled decay and learning rate)
in the same pass, so that an update is rounded once, to the gradient's dtype, at its very end.
"""

# Annotations as text, so that what pickles functions with cloudpickle has no types to pickle.
from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from itertools import starmap
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from adam_jax import _storage
from adam_jax._checks import (
    check_format,
    check_leaf,
    check_leaves,
    check_param,
    check_rate,
    check_real,
    check_state,
    flatten_up_to,
    keystr,
    leaf_path,
)
from adam_jax._moments import arithmetic_dtype, real_dtype, saturate
from adam_jax._storage import Draw, Moment, Moments, Second, Stored
from adam_jax._types import Leaf, LearningRate, Mask, RealLeaf, WeightDecay


class Algorithm(NamedTuple):
    """A variant of Adam, as one leaf sees it."""

    state: type[Any]  # NamedTuple class with fields `count` and one tree per moment
    moments: dict[str, Moment]  # mu, nu and perhaps another, by name
    settings: Any  # hyperparameters: a pytree of scalars, never a reason to compile again
    scalars: Callable[[Any, RealLeaf], Any]  # (settings, count) -> what a step needs of them
    advance: Callable[[Leaf, Moments, Any], Moments]  # (gradient, moments, scalars) -> new moments
    direction: Callable[[Leaf, Moments, Any], Leaf]  # (gradient, new moments, scalars)
    # All three are functions of a module, never closures: jit caches by their identity.


def scale_by(algorithm: Algorithm) -> optax.GradientTransformationExtraArgs:
    """The direction of a step alone, with neither sign nor learning rate."""

    def init(params: optax.Params) -> Any:
        return _init(algorithm, params)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        del params, extra_args
        return _update(algorithm, updates, state)

    return optax.GradientTransformationExtraArgs(init, update)


def descend(
    algorithm: Algorithm,
    learning_rate: LearningRate,
    weight_decay: WeightDecay | None = None,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The whole step: -learning_rate (direction + weight_decay params).

    The state is that of the optax chain it stands for, so checkpoints are interchangeable.
    """
    check_rate("learning_rate", learning_rate)
    if weight_decay is not None:
        check_rate("weight_decay", weight_decay)
    scheduled = any(map(callable, jax.tree.leaves(learning_rate, is_leaf=callable)))
    tail = [optax.scale_by_learning_rate((lambda count: 0.0) if scheduled else 0.0)]
    if weight_decay is not None:
        tail.insert(0, optax.add_decayed_weights(cast(Any, weight_decay), mask))

    def init(params: optax.Params) -> tuple[Any, ...]:
        return (_init(algorithm, params), *(part.init(params) for part in tail))

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, tuple[Any, ...]]:
        del extra_args
        if not isinstance(state, tuple) or len(cast(tuple[Any, ...], state)) != 1 + len(tail):
            size = f" of {len(state)}" if isinstance(state, tuple) else ""
            raise ValueError(
                f"expected a tuple of {1 + len(tail)} states, as init returns it, got "
                f"{type(state).__name__}{size}."
            )
        direction_state, *tail_states = state
        rates = _per_leaf("learning_rate", _at(learning_rate, tail_states[-1]), updates)
        decays: list[Any] | None = None
        if weight_decay is not None:
            if params is None:
                raise ValueError(
                    "weight decay needs the parameters: call update(gradients, state, params)."
                )
            decay = _at(weight_decay, tail_states[0])
            decayed = True if mask is None else mask(params) if callable(mask) else mask
            decays = [decay if yes else None for yes in _per_leaf("mask", decayed, updates)]
        updates, direction_state = _update(
            algorithm, updates, direction_state, params, rates, decays
        )
        # The tail's states hold nothing but the counts of their schedules.
        return updates, (direction_state, *jax.tree.map(optax.safe_increment, tail_states))

    return optax.GradientTransformationExtraArgs(init, update)


def _init(algorithm: Algorithm, params: optax.Params) -> Any:
    check_leaves("parameter", params)
    if algorithm.moments["mu"].format in ("bfloat16", "int8"):
        check_real(algorithm.moments["mu"].format, params)
    param_leaves, treedef = jax.tree.flatten(params)
    moments = {
        name: _storage.to_tree(
            [_storage.zeros(moment, p) for p in param_leaves], treedef.unflatten, moment
        )
        for name, moment in algorithm.moments.items()
    }
    return algorithm.state(count=jnp.zeros([], jnp.int32), **moments)


def _update(
    algorithm: Algorithm,
    gradients: optax.Updates,
    state: Any,
    params: optax.Params | None = None,
    rates: Sequence[Any] | None = None,
    decays: Sequence[Any] | None = None,
) -> tuple[optax.Updates, Any]:
    """One step on every leaf; a leaf whose gradient is None keeps its moments as they are."""
    check_state(algorithm.state, state)
    gradient_leaves, treedef = jax.tree.flatten(gradients, is_leaf=_is_none)

    def leaves(tree: Any, name: str) -> list[Any]:
        return flatten_up_to(treedef, gradients, tree, name)

    def stored_leaves(name: str, moment: Moment) -> list[Second]:
        tree = getattr(state, name)
        check_format(name, moment.format, _storage.format_of(tree, moment.format))
        return _storage.to_leaves(tree, lambda part, field: leaves(part, f"state.{name}{field}"))

    names = list(algorithm.moments)
    moments = list(zip(*starmap(stored_leaves, algorithm.moments.items()), strict=True))
    random = any(moment.format not in (None, "float32") for moment in algorithm.moments.values())
    n = len(gradient_leaves)
    param_leaves = [None] * n
    if decays is not None:
        param_leaves = leaves(params, "params")
    count = jnp.asarray(optax.safe_increment(state.count))
    scalars = _scalars(algorithm.scalars, algorithm.settings, count)
    outcome = []
    for i, (g, stored) in enumerate(zip(gradient_leaves, moments, strict=True)):
        if g is None:
            outcome.append((None, stored))
            continue
        path = functools.partial(leaf_path, gradients, i)
        check_leaf(path, g, stored, names)
        if decays is not None:
            check_param(path, g, param_leaves[i])
        outcome.append(
            _leaf_step(
                algorithm.advance,
                algorithm.direction,
                g,
                stored,
                scalars,
                Draw(np.uint32(i), count) if random else None,
                param_leaves[i],
                rates and rates[i],
                decays and decays[i],
            )
        )
    new_moments = {
        name: _storage.to_tree([stored[k] for _, stored in outcome], treedef.unflatten, moment)
        for k, (name, moment) in enumerate(algorithm.moments.items())
    }
    updates = treedef.unflatten([u for u, _ in outcome])
    return updates, algorithm.state(count=count, **new_moments)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["tree"])
@dataclasses.dataclass(frozen=True)
class _Packed:
    """A tree of scalars as one array, so that each leaf's step has one argument and not a dozen.

    What a call takes to trace, to lower and to dispatch grows with its arguments. The compiler
    takes the array apart again.
    """

    values: jax.Array
    tree: Any  # its jax.tree_util.PyTreeDef

    @functools.partial(jax.jit, static_argnums=1)
    def unpack(self, dtype: DTypeLike) -> Any:
        return self.tree.unflatten(self.values.astype(dtype))


@functools.partial(jax.jit, static_argnums=0)
def _scalars(scalars: Callable[[Any, RealLeaf], Any], settings: Any, count: jax.Array) -> _Packed:
    dtype = jnp.result_type(float)
    leaves, tree = jax.tree.flatten(scalars(settings, count.astype(dtype)))
    return _Packed(jnp.stack([jnp.asarray(x, dtype) for x in leaves]), tree)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _leaf_step(
    advance: Callable[[Leaf, Moments, Any], Moments],
    direction: Callable[[Leaf, Moments, Any], Leaf],
    gradient: Leaf,
    stored: Stored,
    scalars: _Packed,
    draw: Draw | None,
    param: Leaf | None,
    learning_rate: jax.Array | None,
    weight_decay: jax.Array | None,
) -> tuple[Leaf, Stored]:
    """One leaf's step. Jitted by itself: traced once per shape, and one call in eager use."""
    gradient_dtype = gradient.dtype
    dtypes = _storage.float_dtypes(stored)
    wide = arithmetic_dtype(gradient.dtype, *dtypes)
    real = real_dtype(wide)
    narrowest = min(dtypes, key=lambda dtype: jnp.finfo(dtype).bits)
    # Complex leaves meet real scalars, which JAX's strict promotion mode would not allow.
    with jax.numpy_dtype_promotion("standard"):
        s = scalars.unpack(real)
        step = draw.step if draw else np.int32(0)
        scale = _storage.scale_of(stored, real)
        if scale is not None:
            # The same average, of each row's largest gradient: never less than any of its nu, and
            # known without them.
            largest = _largest(gradient.astype(wide), narrowest)
            _, scale = advance(largest, (jnp.zeros_like(scale), scale), s)

        def encoded(
            gradient: Leaf, stored: Stored, scale: RealLeaf | None, draw: Draw | None
        ) -> tuple[Any, Moments]:
            g = saturate(gradient.astype(wide), narrowest)
            moments = advance(g, _storage.load(stored, real, step - 1), s)
            return _storage.encode(moments, stored, scale, draw)

        inputs = gradient, stored, scale, draw
        if draw is not None:
            # What is rounded at random is a step function: derivatives end here.
            inputs = jax.lax.stop_gradient(inputs)
        new, moments = _storage.fitted(encoded, real, *inputs)
        stored = _storage.unpack(new, *inputs[1:3])
        # From the moments as they are stored, so that a step needs no others.
        update = direction(saturate(gradient.astype(wide), narrowest), moments, s)
        if weight_decay is not None and param is not None:
            update = update + weight_decay.astype(real) * param.astype(wide)
        if learning_rate is not None:
            update = -learning_rate.astype(real) * update
    return update.astype(gradient_dtype), stored


def _largest(gradient: Leaf, narrowest: DTypeLike) -> RealLeaf:
    """Each row's largest saturated magnitude, and NaN where there is one.

    As integers, patterns of numbers that are not negative have the order of the numbers, and those
    of NaN come last. A maximum of floats in which XLA for CPU uses vectors loses NaN.
    """
    is_complex = jnp.iscomplexobj(gradient)
    magnitude = jnp.abs(saturate(gradient, narrowest) if is_complex else gradient)
    if is_complex:  # a root, rounded: its square must not be less than the sum of squares
        magnitude = magnitude * (1 + 4 * jnp.finfo(magnitude.dtype).eps)
    word = f"int{jnp.finfo(magnitude.dtype).bits}"
    pattern = jnp.max(jax.lax.bitcast_convert_type(magnitude, word), axis=-1, keepdims=True)
    largest = jax.lax.bitcast_convert_type(pattern, magnitude.dtype)
    return largest if is_complex else saturate(largest, narrowest)


def _at(rate: LearningRate, state: Any) -> Any:
    """A rate, or tree of rates, with schedules evaluated at the count that the state holds."""
    return _as_arrays(
        jax.tree.map(
            lambda r: r(jax.tree.leaves(state)[0]) if callable(r) else r, rate, is_leaf=callable
        )
    )


@jax.jit
def _as_arrays(scalars: Any) -> Any:
    """Numbers as arrays, once: as numbers they would be constants to each leaf's step anew."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(float)), scalars)


def _per_leaf(name: str, prefix: Any, tree: Any) -> list[Any]:
    """The value that `prefix`, a tree prefix of `tree`, gives to each leaf of `tree`."""
    try:
        spread = jax.tree.map(
            lambda value, subtree: jax.tree.map(lambda _: value, subtree, is_leaf=_is_none),
            prefix,
            tree,
            is_leaf=_is_none,
        )
    except ValueError as error:
        raise ValueError(
            f"{name} must be one value or a tree prefix of the parameters: {error}"
        ) from error
    values = jax.tree.leaves(spread, is_leaf=_is_none)
    for i, leaf in enumerate(jax.tree.leaves(tree, is_leaf=_is_none)):
        if values[i] is None and leaf is not None:
            raise ValueError(
                f"{name} is None at {keystr(leaf_path(tree, i))}, which has a gradient."
            )
    return values


def _is_none(x: Any) -> bool:
    return x is None

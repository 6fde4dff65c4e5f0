"""Makes an optax gradient transformation over a tree from the step of one leaf.

This module walks and checks trees. `_step.py` has one leaf's step. It includes decoupled decay and
learning rate, so that an update is rounded once, to the gradient's dtype, at its very end.
"""

# Annotations stay text: cloudpickle then has no types to pickle along with a function.
from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from adam_jax._checks import (
    check_leaf,
    check_leaves,
    check_mask,
    check_param,
    check_rate,
    check_real,
    check_scheduled,
    check_state,
    check_states,
    check_struct,
    flatten_up_to,
    leaf_path,
)
from adam_jax._codec import Codec, Stored, codec_of
from adam_jax._replay import Missed, check_replayable, replay
from adam_jax._rounding import draws
from adam_jax._sharding import is_explicit, other_sharding, resharded
from adam_jax._state import leaves_of, node_types, per_leaf, with_leaves
from adam_jax._step import Algorithm, check_shard_map, leaf_step, scalars_of
from adam_jax._storage import initial, storage_formats
from adam_jax._types import Mask, Rate, StorageFormats, is_function, is_none


class Variant(NamedTuple):
    """A variant of Adam: its arithmetic, its hyperparameters and the contents of its state."""

    algorithm: Algorithm
    hyperparameters: dict[str, Any]  # scalars: never a reason to compile again
    state: type[Any]  # NamedTuple class with the fields count, mu, nu, and perhaps more like nu
    mu_dtype: StorageFormats
    nu_dtype: StorageFormats


def variant(
    algorithm: Algorithm,
    hyperparameters: dict[str, Any],
    state: type[Any],
    mu_dtype: StorageFormats,
    nu_dtype: StorageFormats,
    *,
    mu_not_int8: str | None = None,
    nu_not_int8: str | None = None,
) -> Variant:
    """Returns a variant with checked storage formats."""
    mu_dtype = storage_formats("mu_dtype", mu_dtype, not_int8=mu_not_int8)
    nu_dtype = storage_formats("nu_dtype", nu_dtype, not_int8=nu_not_int8)
    return Variant(algorithm, hyperparameters, state, mu_dtype, nu_dtype)


def scale_by(variant: Variant) -> optax.GradientTransformationExtraArgs:
    """Returns a transformation to the direction of a step, with neither sign nor learning rate."""

    def init(params: optax.Params) -> Any:
        return _init(variant, params)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        return _update(variant, updates, state, params, positions=extra_args.get("positions", ()))

    return optax.GradientTransformationExtraArgs(init, update)


def descend(
    variant: Variant,
    learning_rate: Rate,
    weight_decay: Rate | None = None,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation to a whole step, -learning_rate (direction + weight_decay params).

    Its state is that of the optax chain it replaces, so checkpoints are interchangeable.
    """
    check_rate("learning_rate", learning_rate)
    if weight_decay is not None:
        check_rate("weight_decay", weight_decay)

    def counts(types: Collection[type[Any]]) -> tuple[Any, ...]:
        """Returns the states that follow that of the moments, with the counts of schedules."""
        states = []
        if weight_decay is not None:
            rate = cast(
                Any, optax.constant_schedule(0) if _has_schedule(weight_decay, types) else 0.0
            )
            state = optax.add_decayed_weights(rate).init({})
            states.append(state if mask is None else optax.MaskedState(state))
        if _has_schedule(learning_rate, types):
            states.append(optax.ScaleByScheduleState(jnp.zeros([], jnp.int32)))
        else:
            states.append(optax.EmptyState())
        return tuple(states)

    def init(params: optax.Params) -> tuple[Any, ...]:
        return _init(variant, params), *counts(node_types(params))

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, tuple[Any, ...]]:
        types = node_types(updates)
        check_states((variant.state, *counts(types)), state)
        direction_state, *decay_states, rate_state = state
        masked: list[Any] | None = None
        if weight_decay is not None:
            if params is None:
                raise ValueError(
                    "weight decay needs the parameters: call update(gradients, state, params)."
                )
            if mask is not None:
                tree = mask(params) if is_function(types, mask) else mask
                masked = per_leaf("mask", tree, updates)
                check_mask(functools.partial(leaf_path, updates), masked)
        positions = extra_args.get("positions", ())
        missed = extra_args.get("missed")
        if missed is not None:
            decay = None if masked == [False] else weight_decay
            updates, direction_state = _replay(
                variant, direction_state, params, learning_rate, decay, missed, positions
            )
            return updates, (direction_state, *decay_states, rate_state)
        rate = _at("learning_rate", learning_rate, rate_state, types)
        rates = per_leaf("learning_rate", rate, updates)
        decays: list[Any] | None = None
        if weight_decay is not None:
            decay = _at("weight_decay", weight_decay, decay_states, types)
            decays = per_leaf("weight_decay", decay, updates)
            if masked is not None:
                decays = [x if yes else None for x, yes in zip(decays, masked, strict=True)]
        updates, direction_state = _update(
            variant, updates, direction_state, params, rates, decays, positions
        )
        # The other states hold only the counts of their schedules.
        next_counts = jax.tree.map(optax.safe_increment, (*decay_states, rate_state))
        return updates, (direction_state, *next_counts)

    return optax.GradientTransformationExtraArgs(init, update)


def _init(variant: Variant, params: optax.Params) -> Any:
    check_leaves("parameter", params)
    param_leaves = jax.tree.leaves(params, is_leaf=is_none)
    others = len(variant.state._fields) - 3
    leaves = []
    for i, (param, mu, nu) in enumerate(zip(param_leaves, *_formats(variant, params), strict=True)):
        if param is None:
            leaves.append(Stored(None, None, (None,) * others))
            continue
        check_real(functools.partial(leaf_path, params, i), param, mu)
        leaves.append(initial(param, mu, nu, others))
    empty = variant.state(jnp.zeros([], jnp.int32), *[None] * (2 + others))
    int8 = _has_int8(variant.mu_dtype) or _has_int8(variant.nu_dtype)
    return with_leaves(empty, leaves, params, int8=int8)


def _update(
    variant: Variant,
    gradients: optax.Updates,
    state: Any,
    params: optax.Params | None = None,
    rates: Sequence[Any] | None = None,
    decays: Sequence[Any] | None = None,
    positions: Sequence[Any] = (),
) -> tuple[optax.Updates, Any]:
    """Makes one step on every leaf. A leaf whose gradient is None keeps its moments.

    `positions` are those of `Draw.at`.
    """
    gradient_leaves, treedef = jax.tree.flatten(gradients, is_leaf=is_none)
    stored_leaves, codecs, int8 = _stored(variant, gradients, state)
    count = jnp.asarray(optax.safe_increment(state.count))
    paths = [functools.partial(leaf_path, gradients, i) for i in range(len(gradient_leaves))]
    param_leaves = gradient_leaves
    explicit = any(is_explicit(x.mu) for x in stored_leaves if x.mu is not None)
    if decays is not None or (explicit and params is not None):
        param_leaves = flatten_up_to(treedef, gradients, params, "params")
        for path, g, param in zip(paths, gradient_leaves, param_leaves, strict=True):
            if g is not None:
                check_param(path, g, param)
    scalars = scalars_of(variant.algorithm.scalars, variant.hyperparameters, count, int8)
    rounded = any(codec is not None and codec.random for codec in codecs)
    drawn = draws(len(codecs), count) if rounded else []
    updates, leaves = [], []
    for i, (codec, stored) in enumerate(zip(codecs, stored_leaves, strict=True)):
        update = None
        if codec is not None:
            update, stored = leaf_step(
                variant.algorithm,
                codec,
                other_sharding(stored.mu, param_leaves[i]),
                resharded(gradient_leaves[i], stored.mu),
                stored,
                scalars,
                drawn[i].at(positions, gradient_leaves[i]) if codec.random else None,
                decays and resharded(param_leaves[i], stored.mu),
                rates and rates[i],
                decays and decays[i],
            )
        updates.append(update)
        leaves.append(stored)
    new_state = with_leaves(state._replace(count=count), leaves, gradients, int8=int8)
    return treedef.unflatten(updates), new_state


def _stored(
    variant: Variant, gradients: optax.Updates, state: Any
) -> tuple[list[Stored], list[Codec | None], bool]:
    """Returns a state's leaves, checked, with their formats, and whether any is in int8."""
    check_state(variant.state, state)
    mu_int8, nu_int8 = _has_int8(variant.mu_dtype), _has_int8(variant.nu_dtype)
    check_struct(state.nu, mu_int8=mu_int8, nu_int8=nu_int8)
    if mu_int8 or nu_int8:
        check_shard_map()
    mu_formats, nu_formats = _formats(variant, gradients)
    names = variant.state._fields[1:]
    stored_leaves = leaves_of(state, gradients)
    codecs: list[Codec | None] = []
    for i, (g, stored) in enumerate(
        zip(jax.tree.leaves(gradients, is_leaf=is_none), stored_leaves, strict=True)
    ):
        if g is not None:
            path = functools.partial(leaf_path, gradients, i)
            check_leaf(path, g, stored, names, mu_formats[i], nu_formats[i])
        codecs.append(None if g is None else codec_of(stored))
    return stored_leaves, codecs, mu_int8 or nu_int8


def _replay(
    variant: Variant,
    state: Any,
    param: Any,
    learning_rate: Rate,
    weight_decay: Rate | None,
    missed: Missed,
    positions: Sequence[Any],
) -> tuple[Any, Any]:
    """Makes the steps that rows of a parameter have missed; the state's count stays the same."""
    check_replayable(
        variant.algorithm.idle,
        variant.hyperparameters,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
    )
    missed.made = True
    [stored], [codec], int8 = _stored(variant, param, state)
    count = jnp.asarray(optax.safe_increment(state.count))
    drawn = None
    if codec is not None and codec.random:
        [drawn] = draws(1, count)
        drawn = drawn.at(positions, param)
    update, stored = replay(
        variant.algorithm,
        variant.hyperparameters,
        stored,
        param,
        count,
        missed.steps,
        learning_rate,
        weight_decay,
        drawn,
    )
    return update, with_leaves(state, [stored], param, int8=int8)


def _formats(variant: Variant, tree: Any) -> list[list[str | None]]:
    """Returns the format of mu and that of nu for each leaf of the parameters or gradients."""
    prefixes = {"mu_dtype": variant.mu_dtype, "nu_dtype": variant.nu_dtype}
    return [per_leaf(name, x, tree, none_is_a_value=True) for name, x in prefixes.items()]


def _has_int8(formats: StorageFormats) -> bool:
    """Returns whether codes may be in the state, whose nu is then an `Int8Moment`."""
    return "int8" in jax.tree.leaves(formats)


def _has_schedule(rate: Rate, types: Collection[type[Any]]) -> bool:
    is_schedule = functools.partial(is_function, types)
    return any(map(is_schedule, jax.tree.leaves(rate, is_leaf=is_schedule)))


def _at(name: str, rate: Rate, state: Any, types: Collection[type[Any]]) -> Any:
    """Returns a rate, or tree of rates, with schedules evaluated at the state's count."""
    check_rate(name, rate, types)
    is_schedule = functools.partial(is_function, types)

    def evaluated(rate: Any) -> Any:
        return rate(jax.tree.leaves(state)[0]) if is_schedule(rate) else rate

    rates = jax.tree.map(evaluated, rate, is_leaf=is_schedule)
    check_scheduled(name, rates)
    return _as_arrays(rates)


@jax.jit
def _as_arrays(scalars: Any) -> Any:
    """Returns numbers as arrays. As numbers they would be new constants in each leaf's step."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(float)), scalars)

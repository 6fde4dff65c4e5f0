"""Temporal averaging of the parameters: section 7.2 of Kingma and Ba, arXiv:1412.6980."""

# Annotations as text, so that what pickles functions with cloudpickle has no types to pickle.
from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adam_jax._checks import check_decay, check_leaves, check_state
from adam_jax._master_weights import weights_of
from adam_jax._moments import Blend, Decay, arithmetic_dtype, bias_correction, decayed
from adam_jax._rounding import nearest
from adam_jax._sharding import fetched, placed, resharded
from adam_jax._state import (
    applied,
    leaves_beside,
    only_state,
    states_of,
    unaliased,
    with_extra_args,
)
from adam_jax._types import Leaf, RealLeaf, Scalar, is_none


class AverageParamsState(NamedTuple):
    """State of `average_params`.

    Attributes:
        count: int32, shape (): t, the number of steps averaged over.
        weight: float32, shape (): the sum of the average's weights, 1 - decay^t for a constant
            decay.
        average: theta_avg, biased towards zero: shaped like the parameters, float32 or wider.
        inner_state: the state of the optimizer inside.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    weight: jax.Array
    average: optax.Params
    inner_state: Any


def average_params(
    inner: optax.GradientTransformation, decay: Scalar = 0.999
) -> optax.GradientTransformationExtraArgs:
    """Keeps an average of the parameters, beside whatever `inner` does to them.

    After each step of `inner`, with theta the new parameters,

        theta_avg <- decay theta_avg + (1 - decay) theta

    (section 7.2 of [Kingma and Ba (2015)](https://arxiv.org/abs/1412.6980)), in float32 or
    wider. The updates are those of `inner`. `averaged_params` reads the average out. Wrap the
    whole chain: what is averaged is `optax.apply_updates(params, updates)` with the updates
    that leave this wrapper.

    What counts are steps of the optimizer: where `inner` has `optax.MultiSteps` or
    `optax.apply_if_finite` in it, a call that makes no step leaves the average alone. With
    `master_weights`, inside or outside, the float32 weights are averaged. One order has everything
    right: `master_weights(average_params(optax.MultiSteps(chain, k)))`.

    Args:
        inner: any optax gradient transformation.
        decay: in [0, 1); the average looks back over about 1 / (1 - decay) steps. It may change
            from step to step, or when a run is continued.

    Returns:
        An optax gradient transformation. Its `AverageParamsState` has one more float32 for each
        parameter, or what is as wide as the parameter.

    Raises:
        ValueError: for a decay out of range, and in `update` when called without parameters.
        TypeError: in `init`, for a parameter of integer dtype, naming its path.
    """
    check_decay("decay", decay)
    inner = with_extra_args(inner)
    b = Decay.of(decay)

    def init(params: optax.Params) -> AverageParamsState:
        check_leaves("parameter", params)
        return AverageParamsState(
            count=jnp.zeros([], jnp.int32),
            weight=jnp.zeros([], jnp.float32),
            average=jax.tree.map(
                lambda p: jnp.zeros_like(p, arithmetic_dtype(jnp.result_type(p))), params
            ),
            inner_state=inner.init(params),
        )

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AverageParamsState]:
        if params is None:
            raise ValueError(
                "average_params needs the parameters: call update(gradients, state, params)."
            )
        check_state(AverageParamsState, state)
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        new = _averaged(state, weights_of(applied(params, updates), inner_state), b)
        stepped = _steps_made(state.inner_state, inner_state, updates)
        if stepped is not None:
            new = jax.tree.map(
                lambda x, old: jnp.where(stepped, x, old), new, state._replace(inner_state=())
            )
        return updates, new._replace(inner_state=inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def averaged_params(params: optax.Params, state: Any) -> optax.Params:
    """The averaged parameters theta_avg / (1 - decay^t), in the dtypes of `params`.

    With `master_weights`, `averaged_params(master_params(params, state), state)` is in float32.

    Args:
        params: the current parameters; returned as they are before the first step, and always
            where the state has no average of them, because they are masked or no arrays.
        state: an optimizer state with one `average_params` state in it, at any depth.

    Returns:
        A tree shaped like `params`.

    Raises:
        ValueError: when there is no such state, or more than one.
    """
    found = only_state(AverageParamsState, "average_params", state)
    [weight] = jax.tree.leaves(found.weight)  # which Flax may have put into a box

    def read(param: Any, average: Any) -> Any:
        averages = jax.tree.leaves(average)  # none where it is None or a `MaskedNode`
        return placed(_read_leaf(param, fetched(averages[0]), weight), param) if averages else param

    leaves, tree = jax.tree.flatten(params)
    averages = leaves_beside(params, found.average, "state.average")
    return unaliased(tree.unflatten(map(read, leaves, averages)), params)


def _averaged(state: AverageParamsState, params: optax.Params, b: Decay) -> AverageParamsState:
    """Returns the average after one more step, without the state of the optimizer inside."""
    count = jnp.asarray(optax.safe_increment(state.count))
    average = jax.tree.map(
        lambda a, p: a if a is None else _average_leaf(a, p, b),
        state.average,
        params,
        is_leaf=is_none,
    )
    return AverageParamsState(count, _next_weight(state.weight, count, b), average, ())


def _steps_made(old: Any, new: Any, updates: optax.Updates) -> jax.Array | None:
    """Whether the optimizer inside made a step, or None if it makes one at each call.

    `optax.MultiSteps` makes one in so many calls, `optax.apply_if_finite` none of a gradient that
    is not finite, unless there were too many of these.
    """
    stepped = [
        x.gradient_step != y.gradient_step
        for x, y in zip(
            *(states_of(optax.MultiStepsState, state) for state in (old, new)), strict=True
        )
    ]
    for x in states_of(optax.ApplyIfFiniteState, new):
        moved = [jnp.any(u != 0) for u in jax.tree.leaves(updates)]
        stepped.append(functools.reduce(jnp.logical_or, moved, x.last_finite))
    return functools.reduce(jnp.logical_and, stepped) if stepped else None


@jax.jit
def _next_weight(weight: RealLeaf, count: jax.Array, decay: Decay) -> RealLeaf:
    """The sum of the weights after one more step, weight <- decay weight + (1 - decay)."""
    t = count.astype(float)
    before = jax.lax.stop_gradient(bias_correction(decay, t - 1))
    # Close to 1 float32 stands still before it is there, by 3e-5 with a decay of 0.999. Where the
    # decay has been this one from the beginning, the sum is known.
    wide = weight.astype(t.dtype)
    constant = jnp.abs(wide - before) <= 4 * float(jnp.finfo(weight.dtype).eps) * before
    blend = Blend.of(jax.tree.map(lambda x: jnp.asarray(x, t.dtype), decay))
    next_weight = decayed(wide, jnp.ones_like(t), blend)
    return jnp.where(constant, bias_correction(decay, t), next_weight).astype(weight.dtype)


@jax.jit
def _average_leaf(average: Leaf, param: Leaf, decay: Decay) -> Leaf:
    dtype = jnp.finfo(average.dtype).dtype
    blend = Blend.of(jax.tree.map(lambda x: jnp.asarray(x, dtype), decay))
    # The average is of parameters as they are stored.
    param = nearest(resharded(param, average).astype(average.dtype), param.dtype)
    with jax.numpy_dtype_promotion("standard"):  # complex leaves meet real scalars
        return decayed(average, param.astype(average.dtype), blend)


@jax.jit
def _read_leaf(param: Leaf, average: Leaf, weight: RealLeaf) -> Leaf:
    weight = weight.astype(jnp.finfo(average.dtype).dtype)
    started = weight > 0
    with jax.numpy_dtype_promotion("standard"):
        corrected = average / jnp.where(started, weight, 1)
    return jnp.where(started, resharded(corrected.astype(param.dtype), param), param)

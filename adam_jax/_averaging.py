"""Averages the parameters over time: section 7.2 of Kingma and Ba, arXiv:1412.6980."""

# Annotations stay text: cloudpickle then has no types to pickle along with a function.
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
    r"""State of `average_params`.

    Attributes:
        count: int32, shape (): $t$, the number of steps averaged over.
        weight: float32, shape (): the sum of the average's weights, $1 - \beta^t$ for a constant
            decay $\beta$.
        average: $\bar\theta$, biased towards zero: shaped like the parameters, float32 or wider.
        inner_state: the state of the inner optimizer.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    weight: jax.Array
    average: optax.Params
    inner_state: Any


def average_params(
    inner: optax.GradientTransformation, decay: Scalar = 0.999
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps an exponential average of the parameters, while `inner` trains them.

    After each step of `inner`, with $\theta$ the new parameters and $\beta$ = `decay`,

    $$\bar\theta \leftarrow \beta\, \bar\theta + (1 - \beta)\, \theta$$

    (section 7.2 of [Kingma and Ba (2015)](https://arxiv.org/abs/1412.6980)), in float32 or
    wider. The updates of `inner` pass through unchanged. `averaged_params` reads the average out.
    Wrap the whole chain: the wrapper averages `optax.apply_updates(params, updates)` with the
    updates that it returns.

    Only steps of the optimizer count. If `inner` contains `optax.MultiSteps` or
    `optax.apply_if_finite`, a call that makes no step leaves the average alone. With
    `master_weights`, inside or outside, the float32 weights are averaged. If you use all three,
    nest them as `master_weights(average_params(optax.MultiSteps(chain, k)))`.

    Args:
        inner: any optax gradient transformation.
        decay: $\beta$, in [0, 1); the average looks back over about 1 / (1 - decay) steps. It may
            change from step to step, or when a run is continued.

    Returns:
        An optax gradient transformation with an `AverageParamsState`, which has one more float32
        for each parameter (as many bits as the parameter, if that is wider).

    Raises:
        ValueError: for a decay out of range, and in `update` without parameters.
        TypeError: in `init`, for a parameter of integer dtype, naming its path.

    Examples:
        >>> import adam_jax, jax.numpy as jnp, optax
        >>> optimizer = adam_jax.average_params(optax.sgd(1.0), decay=0.5)
        >>> params = jnp.array([0.0])
        >>> state = optimizer.init(params)
        >>> for gradient in (-1.0, -1.0):  # parameters become 1, then 2
        ...     updates, state = optimizer.update(jnp.array([gradient]), state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> adam_jax.averaged_params(params, state)  # (1 + 2 * 2) / 3
        Array([1.6666666], dtype=float32)
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
    r"""Returns the averaged parameters, without the bias towards zero.

    That is $\bar\theta / (1 - \beta^t)$ with the average $\bar\theta$ and the decay $\beta$ of
    `average_params`, in the dtypes of `params`. With `master_weights`,
    `averaged_params(master_params(params, state), state)` is in float32.

    Args:
        params: the current parameters. They are returned unchanged before the first step, and for
            leaves of which the state has no average, because they are masked or no arrays.
        state: an optimizer state with one `average_params` state in it, at any depth.

    Returns:
        A tree shaped like `params`, with the same dtypes.

    Raises:
        ValueError: if there is no such state, or more than one.

    Examples:
        >>> import adam_jax, jax.numpy as jnp
        >>> params = jnp.array([1.0])
        >>> state = adam_jax.average_params(adam_jax.adam(0.1)).init(params)
        >>> adam_jax.averaged_params(params, state)
        Array([1.], dtype=float32)
    """
    found = only_state(AverageParamsState, "average_params", state)
    [weight] = jax.tree.leaves(found.weight)  # Flax may have put the weight into a box

    def read(param: Any, average: Any) -> Any:
        averages = jax.tree.leaves(average)  # none where it is None or a `MaskedNode`
        return placed(_read_leaf(param, fetched(averages[0]), weight), param) if averages else param

    leaves, tree = jax.tree.flatten(params)
    averages = leaves_beside(params, found.average, "state.average")
    return unaliased(tree.unflatten(map(read, leaves, averages)), params)


def _averaged(state: AverageParamsState, params: optax.Params, b: Decay) -> AverageParamsState:
    """Returns the average after one more step, without the state of the inner optimizer."""
    count = jnp.asarray(optax.safe_increment(state.count))
    average = jax.tree.map(
        lambda a, p: a if a is None else _average_leaf(a, p, b),
        state.average,
        params,
        is_leaf=is_none,
    )
    return AverageParamsState(count, _next_weight(state.weight, count, b), average, ())


def _steps_made(old: Any, new: Any, updates: optax.Updates) -> jax.Array | None:
    """Returns whether the inner optimizer made a step, or None if each call makes one.

    `optax.MultiSteps` makes one every few calls. `optax.apply_if_finite` makes none for a gradient
    that is not finite, unless there were too many of these.
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
    """Returns the sum of the weights after a step: weight <- decay weight + (1 - decay)."""
    t = count.astype(float)
    before = jax.lax.stop_gradient(bias_correction(decay, t - 1))
    # Close to 1, float32 stops short of the limit, by 3e-5 with a decay of 0.999. If the decay has
    # been constant from the beginning, the sum has a closed form.
    wide = weight.astype(t.dtype)
    constant = jnp.abs(wide - before) <= 4 * float(jnp.finfo(weight.dtype).eps) * before
    blend = Blend.of(jax.tree.map(lambda x: jnp.asarray(x, t.dtype), decay))
    next_weight = decayed(wide, jnp.ones_like(t), blend)
    return jnp.where(constant, bias_correction(decay, t), next_weight).astype(weight.dtype)


@jax.jit
def _average_leaf(average: Leaf, param: Leaf, decay: Decay) -> Leaf:
    dtype = jnp.finfo(average.dtype).dtype
    blend = Blend.of(jax.tree.map(lambda x: jnp.asarray(x, dtype), decay))
    # Averages the parameters as they are stored.
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

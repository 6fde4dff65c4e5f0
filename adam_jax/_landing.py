"""Checks, for debugging, that parameters are where the last updates should have brought them."""

# Annotations stay text: cloudpickle then has no types to pickle along with a function.
from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adam_jax._checks import check_state, keystr
from adam_jax._state import applied, with_extra_args
from adam_jax._types import RealLeaf, is_low


class CheckLandingState(NamedTuple):
    """State of `check_landing`.

    Attributes:
        sums: uint32, shape (n,): for each of the n parameters in bfloat16 and float16, the sum of
            the bit patterns that the last updates should have left.
        known: bool, shape (): False before the first step, and after `load_master_params` or
            `convert_remainder` has moved parameters.
        inner_state: the state of the inner optimizer.
    """

    sums: jax.Array
    known: jax.Array
    inner_state: Any


def check_landing(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Checks that nothing changes the updates of `master_weights` before they are added.

    Parameter and remainder belong together. Whatever scales, clips or rounds updates separates
    them: from then on training uses wrong weights, and nothing shows it. Put this wrapper
    right around `master_weights`. In the next `update` it notices parameters that are not
    `optax.apply_updates(params, updates)` of the last one:

        optimizer = optax.chain(check_landing(master_weights(adamw(1e-3), "int8")), ...)

    It reads all parameters twice a step and waits for the result, so it is for debugging. It cannot
    check the last step of a run, or detect a change so small that parameters round to the same
    number. Inside `jax.shard_map` each device checks its own part.

    Args:
        inner: an optimizer made by `master_weights`, or any other.

    Returns:
        An optax gradient transformation with a `CheckLandingState`. It passes on the updates of
        `inner`.

    Raises:
        ValueError: in `update`, if a parameter in bfloat16 or float16 is not where it should be,
            naming its path (a jitted program raises `jax.errors.JaxRuntimeError` instead), and
            without parameters.

    Examples:
        >>> import adam_jax, jax.numpy as jnp, optax
        >>> inner = adam_jax.master_weights(adam_jax.adam(0.1), "int16")
        >>> optimizer = optax.chain(adam_jax.check_landing(inner), optax.scale(0.5))
        >>> params = {"w": jnp.ones(2, jnp.bfloat16)}
        >>> updates, state = optimizer.update(params, optimizer.init(params), params)
        >>> params = optax.apply_updates(params, updates)
        >>> try:
        ...     optimizer.update(params, state, params)
        ... except Exception as error:
        ...     print("['w'] is not where" in str(error))
        True
    """
    inner = with_extra_args(inner)

    def init(params: optax.Params) -> CheckLandingState:
        low = [p for p in jax.tree.leaves(params) if is_low(p)]
        return CheckLandingState(
            jnp.zeros(len(low), jnp.uint32), jnp.zeros((), bool), inner.init(params)
        )

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, CheckLandingState]:
        if params is None:
            raise ValueError(
                "check_landing needs the parameters: call update(gradients, state, params)."
            )
        check_state(CheckLandingState, state)
        paths = [
            keystr(path) for path, p in jax.tree_util.tree_leaves_with_path(params) if is_low(p)
        ]
        landed = ~state.known | (_sums(params) == state.sums)
        jax.debug.callback(functools.partial(_raise_unless, paths), landed)
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        return updates, CheckLandingState(
            _sums(applied(params, updates)), jnp.ones_like(state.known), inner_state
        )

    return optax.GradientTransformationExtraArgs(init, update)


def moved(state: CheckLandingState) -> CheckLandingState:
    """Returns the state after the caller has moved parameters on purpose."""
    return state._replace(known=jax.tree.map(jnp.zeros_like, state.known))


def _sums(params: optax.Params) -> jax.Array:
    sums = [_sum(p) for p in jax.tree.leaves(params) if is_low(p)]
    return jnp.stack(sums) if sums else jnp.zeros(0, jnp.uint32)


@jax.jit
def _sum(param: RealLeaf) -> jax.Array:
    patterns = jax.lax.bitcast_convert_type(param, np.uint16)
    return jnp.sum(patterns, dtype=jnp.uint32)


def _raise_unless(paths: Sequence[str], landed: Any) -> None:
    # As a NumPy array: a callback that computes with a JAX array waits for threads that, on a CPU,
    # wait for the callback.
    for path, yes in zip(paths, np.asarray(landed), strict=True):
        if not yes:
            raise ValueError(
                f"parameter {path} is not where the last updates should have brought it. Nothing "
                "may scale, clip or round the updates of master_weights: put it inside, as in "
                "master_weights(optax.chain(...), ...), and add updates with optax.apply_updates."
            )

"""Makes the steps that a row has missed, in which its gradient was 0, at once.

Adam moves a row without a gradient as long as the row's first moment decays. j steps after
moments m and v, with r = sqrt(b2), Adam's step is

    alpha_t m b1^j h(t) / (sqrt(v) r^j + eps sqrt(1 - b2^t))
    h(t) = sqrt(1 - b2^t) / (1 - b1^t)

Only m and sqrt(v) differ from element to element; everything else is one number for each row and
step. The step falls as (b1 / r)^j, so steps after the first K, with (b1 / r)^K = 1e-8, count as 0.
The other variants have sums of the same form.
"""

# Annotations stay text: cloudpickle then has no types to pickle along with a function.
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from adam_jax._codec import Moments, Stored, codec_of, unit_of_mu
from adam_jax._moments import Decay, real_dtype
from adam_jax._rounding import Draw
from adam_jax._step import Algorithm, Idle, sealed_rows
from adam_jax._types import Leaf, RealLeaf

_CHUNK = 16  # steps that one pass over the elements makes
_NEGLIGIBLE = 1e-8  # as a fraction of the first missed step


class Missed:
    """How many steps each row has missed: an extra argument of an optimizer's update.

    Given this, update makes these steps and ignores the gradient; the count is that before the last
    of them. An optimizer that does not know the argument would make one ordinary step instead,
    which `made` reveals.

    Attributes:
        steps: int32, one for each row.
        made: whether an optimizer has made them.
    """

    def __init__(self, steps: jax.Array):
        self.steps = steps
        self.made = False


def replayed_steps(idle: Idle, hyperparameters: dict[str, Any]) -> int:
    """Returns K: after so many missed steps the rest of a step is negligible."""
    b1, b2 = (float(hyperparameters[name].b) for name in ("b1", "b2"))
    if b1 == 0:
        return 0
    return math.ceil(math.log(_NEGLIGIBLE) / math.log(idle.ratio(b1, b2)))


def check_replayable(idle: Idle, hyperparameters: dict[str, Any], **rates: Any) -> None:
    """Raises ValueError for settings whose missed steps cannot be made up for."""
    b1, b2 = hyperparameters["b1"].b, hyperparameters["b2"].b
    scalars = rates | {"b1": b1, "b2": b2, "eps": hyperparameters["eps"]}
    scalars["eps_root"] = hyperparameters.get("eps_root", 0.0)
    for name, value in scalars.items():
        if isinstance(value, Tracer):
            raise ValueError(
                f"{name} is traced. With exact=True the steps that a row missed are made later, "
                "when its past values are unknown: pass a number, or a schedule of the step count "
                "for a rate."
            )
    if float(scalars["eps_root"]) != 0:
        raise ValueError("exact=True has no formula for eps_root > 0: leave it at 0.")
    if float(b1) and idle.ratio(float(b1), float(b2)) >= 1:
        raise ValueError(
            f"with b1 = {float(b1)} and b2 = {float(b2)} a row without gradient would never come "
            "to rest: exact=True needs b1 < sqrt(b2), or b1 < b2 for adamax."
        )
    product = [float(x) for x in rates.values() if x is not None and not callable(x)]
    if len(product) == 2 and math.prod(product) >= 1:
        raise ValueError(
            f"learning_rate * weight_decay must be less than 1, got {math.prod(product)}. Choose "
            "smaller ones."
        )


def replay(
    algorithm: Algorithm,
    hyperparameters: dict[str, Any],
    stored: Stored,
    param: Leaf,
    count: jax.Array,
    missed: jax.Array,
    learning_rate: Any,
    weight_decay: Any | None,
    draw: Draw | None,
) -> tuple[RealLeaf, Stored]:
    """Makes the last `missed` of the first `count` steps of each row.

    Returns the change of the rows, and their new moments.
    """
    codec = codec_of(stored)
    wide = codec.arithmetic_dtype(param.dtype)
    dtype = real_dtype(wide)
    idle = algorithm.idle
    hyper = jax.tree.map(lambda x: jnp.asarray(x, dtype), hyperparameters)

    def scalars_at(step: RealLeaf) -> Any:
        return algorithm.scalars(step, **hyper)

    def powers(steps: jax.Array) -> tuple[RealLeaf, RealLeaf]:
        p1, p2 = (_power(hyperparameters[name], steps, dtype) for name in ("b1", "b2"))
        return p1, p2

    opened = codec.opened(stored.rows, dtype)
    moments = codec.read(stored, opened, dtype)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        of_rows = lambda x: x.reshape(x.shape + (1,) * (param.ndim - 1))  # noqa: E731
        direction, log_factor = _summed(
            idle,
            moments,
            missed,
            count - missed,
            replayed_steps(idle, hyperparameters),
            scalars_at,
            powers,
            lambda step: _at(learning_rate, step, dtype),
            None if weight_decay is None else lambda step: _at(weight_decay, step, dtype),
            constant=not (callable(learning_rate) or callable(weight_decay)),
        )
        update = -moments[0] * direction
        if log_factor is not None:
            update = update + param.astype(wide) * jnp.expm1(of_rows(log_factor))
        p1, p2 = map(of_rows, powers(missed))
        now = scalars_at(count.astype(dtype))
        new = idle.advance(moments, p1, p2, now)
        rows = stored.rows
        if codec.coded:
            unit: Any = unit_of_mu(hyper["b1"], hyper["b2"], count.astype(dtype))
            scale = None
            if codec.nu_is_coded:
                _, scale = idle.advance((jnp.zeros_like(opened.scale), opened.scale), p1, p2, now)
            rows, opened = sealed_rows(codec, scale, opened, unit)
        written, _ = codec.write(new, stored, opened, draw)
    return update, written._replace(rows=rows)


def _summed(
    idle: Idle,
    moments: Moments,
    missed: jax.Array,
    last: jax.Array,
    replayed: int,
    scalars_at: Callable[[RealLeaf], Any],
    powers: Callable[[jax.Array], tuple[RealLeaf, RealLeaf]],
    rate: Callable[[jax.Array], RealLeaf],
    decay: Callable[[jax.Array], RealLeaf] | None,
    constant: bool,
) -> tuple[RealLeaf, RealLeaf | None]:
    """Returns the sum of the missed steps, divided by -mu, and the logarithm of their decay."""
    _, nu, *_ = moments
    dtype = nu.dtype
    replayed = _CHUNK * math.ceil(replayed / _CHUNK)
    of_rows = lambda x: x.reshape(x.shape + (1,) * (nu.ndim - 1))  # noqa: E731

    def log_factors(steps: jax.Array) -> RealLeaf:
        assert decay is not None
        return jnp.log1p(-rate(steps) * decay(steps))

    def chunk(i: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        total, log_factor = carry
        j = i * _CHUNK + 1 + jnp.arange(_CHUNK, dtype=jnp.int32)[:, None]
        steps, made = last + j, j <= missed
        root = idle.root(moments)  # before the loop, it would take memory until the loop ends
        terms = idle.terms(scalars_at(steps.astype(dtype)), *powers(j))
        weight = jnp.where(made, rate(steps) * terms.weight, 0)
        if decay is not None:
            logs = jnp.where(made, log_factors(steps), 0)
            later = jnp.cumsum(logs[::-1], axis=0)[::-1] - logs
            weight = weight * jnp.exp(later)
            total = total * of_rows(jnp.exp(later[0] + logs[0]))
            log_factor = log_factor + later[0] + logs[0]
        for k in range(_CHUNK):
            above = root if terms.floor is None else jnp.maximum(root, of_rows(terms.floor[k]))
            total = total + of_rows(weight[k]) / (above + of_rows(terms.eps[k]))
        return total, log_factor

    zero = jnp.zeros(missed.shape, dtype)
    chunks = -(-jnp.max(jnp.minimum(missed, replayed), initial=0) // _CHUNK)
    total, log_factor = jax.lax.fori_loop(0, chunks, chunk, (jnp.zeros_like(nu), zero))
    if decay is None:
        return total, None

    def rest(i: jax.Array, log_factor: jax.Array) -> jax.Array:
        j = replayed + i * _CHUNK + 1 + jnp.arange(_CHUNK, dtype=jnp.int32)[:, None]
        return log_factor + jnp.sum(jnp.where(j <= missed, log_factors(last + j), 0), axis=0)

    left = jnp.maximum(missed - replayed, 0)
    if constant:
        log_rest = left.astype(dtype) * log_factors(last)
    else:
        chunks = -(-jnp.max(left, initial=0) // _CHUNK)
        log_rest = jax.lax.fori_loop(0, chunks, rest, zero)
    return total * of_rows(jnp.exp(log_rest)), log_factor + log_rest


def _power(decay: Decay, steps: jax.Array, dtype: Any) -> RealLeaf:
    """Returns b^steps, within a few ulps.

    In float32, the rounding error of the logarithm would be multiplied by the number of steps.
    """
    b = float(decay.b)
    steps = steps.astype(dtype)
    if b == 0:
        return (steps == 0).astype(dtype)
    log = math.log(b)
    high = _upper_bits(log)
    return jnp.exp(steps * high) * jnp.exp(steps * (log - high))


def _upper_bits(x: float) -> float:
    """Returns the upper 12 bits of a number, whose product with a number of 12 bits is exact."""
    mantissa, exponent = math.frexp(x)
    return math.ldexp(round(mantissa * 2**12), exponent - 12)


def _at(rate: Any, steps: jax.Array, dtype: Any) -> RealLeaf:
    """Returns a rate at steps, which schedules count from 0. A constant rate has shape ()."""
    if not callable(rate):
        return jnp.asarray(rate, dtype)
    values: Any = jax.vmap(rate)(steps.reshape(-1) - 1)
    return values.astype(dtype).reshape(steps.shape)

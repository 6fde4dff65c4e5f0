"""AdaMax, Algorithm 2 of Kingma and Ba, arXiv:1412.6980, section 7.1."""

from typing import NamedTuple

import jax.numpy as jnp
import optax

from adam_jax._checks import check_decay, check_not_negative
from adam_jax._moments import Decay, bias_correction, decay, decayed
from adam_jax._storage import Moment, Moments, storage_format
from adam_jax._transformation import Algorithm, descend, scale_by
from adam_jax._types import Leaf, LearningRate, Mask, RealLeaf, Scalar, StorageFormat, WeightDecay

_NO_MU_UNIT = "mu in int8 counts in square roots of a second raw moment, which AdaMax does not have"
_MAXIMUM = (
    "u is a maximum over time, and a maximum of numbers rounded at random keeps the largest "
    "rounding error, so that steps would be too short"
)


class _Settings(NamedTuple):
    b1: Decay
    b2: Decay
    eps: Scalar


class _Scalars(NamedTuple):
    settings: _Settings
    unbias_m: Scalar  # 1 / (1 - b1^t)


def _scalars(s: _Settings, t: RealLeaf) -> _Scalars:
    return _Scalars(settings=s, unbias_m=1 / bias_correction(s.b1, t))


def _advance(g: Leaf, moments: Moments, s: _Scalars) -> Moments:
    m, u = moments
    b1, b2, eps = s.settings
    return decayed(m, g, b1), jnp.maximum(u - b2.one_minus_b * u, jnp.abs(g) + eps)


def _direction(g: Leaf, moments: Moments, s: _Scalars) -> Leaf:
    m, u = moments
    # With eps = 0, u is 0 until a gradient is not: no step then, and no NaN in the derivative.
    still = u == 0
    return jnp.where(still, 0, m * s.unbias_m / jnp.where(still, 1, u))


def _algorithm(
    b1: Scalar, b2: Scalar, eps: Scalar, mu_dtype: StorageFormat, nu_dtype: StorageFormat
) -> Algorithm:
    check_decay("b1", b1)
    check_decay("b2", b2)
    check_not_negative("eps", eps)
    return Algorithm(
        state=optax.ScaleByAdamState,
        moments={
            "mu": Moment(storage_format("mu_dtype", mu_dtype, not_int8=_NO_MU_UNIT), real=False),
            "nu": Moment(storage_format("nu_dtype", nu_dtype, not_int8=_MAXIMUM), real=True),
        },
        settings=_Settings(decay(b1), decay(b2), eps),
        scalars=_scalars,
        advance=_advance,
        direction=_direction,
    )


def scale_by_adamax(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    *,
    mu_dtype: StorageFormat = None,
    nu_dtype: StorageFormat = None,
) -> optax.GradientTransformationExtraArgs:
    """AdaMax's direction m^ / u, with neither sign nor learning rate.

    `adamax` gives the equations, the arguments and the errors. The state is
    `optax.ScaleByAdamState`, as in `scale_by_adam`, with u for `nu`: `mu` and `nu` are shaped
    like the parameters, float32, or bfloat16 where that is asked for.
    """
    return scale_by(_algorithm(b1, b2, eps, mu_dtype, nu_dtype))


def adamax(
    learning_rate: LearningRate,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    *,
    mu_dtype: StorageFormat = None,
    nu_dtype: StorageFormat = None,
) -> optax.GradientTransformationExtraArgs:
    """AdaMax, Algorithm 2 of [Kingma and Ba (2015)](https://arxiv.org/abs/1412.6980).

    The first moment is Adam's; an exponentially weighted infinity norm takes the place of the
    second:

        m <- b1 m + (1 - b1) g
        u <- max(b2 u, |g| + eps)
        update = -(alpha / (1 - b1^t)) m / u

    No step is longer than alpha b2 (1 - b1) / (b2 - b1), if b1 < b2: 1.009 alpha with the
    defaults, where the paper says alpha. u needs no bias correction. The eps inside the maximum
    is optax's and torch's addition to the paper; with eps = 0, a coordinate whose gradients have
    all been zero has u = 0 and does not move.

    Args:
        learning_rate: alpha, as in `adam`; the paper suggests 0.002.
        b1: decay rate of the first moment, in [0, 1).
        b2: decay rate of the infinity norm, in [0, 1).
        eps: added to |g|, in units of the gradient.
        mu_dtype: how m is stored: None, "float32" or "bfloat16". Not "int8", which counts in
            square roots of a second raw moment, and there is none.
        nu_dtype: how u is stored: likewise. Not "int8": u is a maximum, and a maximum of numbers
            rounded at random would keep the largest rounding error.

    Returns:
        An optax gradient transformation. Its state is that of `scale_by_adamax`, and equals that
        of `optax.adamax`, leaf for leaf.

    Raises:
        ValueError: as `adam`.
        TypeError: as `adam`.
    """
    return descend(_algorithm(b1, b2, eps, mu_dtype, nu_dtype), learning_rate)


def adamaxw(
    learning_rate: LearningRate,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: WeightDecay = 1e-4,
    mask: Mask | None = None,
    *,
    mu_dtype: StorageFormat = None,
    nu_dtype: StorageFormat = None,
) -> optax.GradientTransformationExtraArgs:
    """AdaMax with decoupled weight decay.

        update = -alpha (m / ((1 - b1^t) u) + weight_decay theta)

    `weight_decay` and `mask` are those of `adamw`, the other arguments, the state, dtypes and
    errors those of `adamax`. `update` needs the parameters theta.
    """
    return descend(_algorithm(b1, b2, eps, mu_dtype, nu_dtype), learning_rate, weight_decay, mask)

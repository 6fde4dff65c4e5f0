"""AdaMax, Algorithm 2 of Kingma and Ba, arXiv:1412.6980, section 7.1."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import optax

from adam_jax._checks import check_decay, check_not_negative
from adam_jax._codec import Moments
from adam_jax._moments import Blend, Decay, bias_correction, decayed
from adam_jax._step import Algorithm, Idle, IdleTerms
from adam_jax._storage import MAXIMUM
from adam_jax._transformation import Variant, descend, scale_by, variant
from adam_jax._types import Leaf, Mask, Rate, RealLeaf, Scalar, StorageFormats

_NO_MU_UNIT = "mu in int8 counts in square roots of a second raw moment, which AdaMax does not have"


class _Scalars(NamedTuple):
    """What all leaves have in common at a step."""

    b1: Blend
    one_minus_b2: Scalar
    eps: Scalar
    unbias_m: Scalar  # 1 / (1 - b1^t)


def _scalars(t: RealLeaf, b1: Decay, b2: Decay, eps: Scalar) -> _Scalars:
    return _Scalars(Blend.of(b1), b2.one_minus_b, eps, unbias_m=1 / bias_correction(b1, t))


def _advance(g: Leaf, moments: Moments, s: _Scalars) -> Moments:
    m, u = moments
    u = jnp.maximum(u - s.one_minus_b2 * u, jnp.abs(g) + s.eps)
    return decayed(m, g, s.b1), u


def _direction(g: Leaf, moments: Moments, s: _Scalars) -> Leaf:
    m, u = moments
    # With eps = 0, u is 0 until a gradient is not: no step then, and no NaN in the derivative. The
    # division comes last. A choice after it would keep compilers from fusing the product with the
    # learning rate and the sum that follows, in some programs and not in others.
    still = u == 0
    return jnp.where(still, 0, m * s.unbias_m) / jnp.where(still, 1, u)


def _idle_root(moments: Moments) -> RealLeaf:
    _, u = moments
    return jnp.where(u == 0, 1, u)  # m is 0 there


def _idle_terms(s: _Scalars, p1: RealLeaf, p2: RealLeaf) -> IdleTerms:
    zero = jnp.zeros_like(p2)
    return IdleTerms(p1 * s.unbias_m / p2, eps=zero, floor=s.eps / p2)


def _idle_advance(moments: Moments, p1: RealLeaf, p2: RealLeaf, s: _Scalars) -> Moments:
    m, u = moments
    return m * p1, jnp.maximum(u * p2, s.eps)


def _idle_ratio(b1: float, b2: float) -> float:
    return b1 / b2 if b2 else math.inf


_IDLE = Idle(_idle_root, _idle_terms, _idle_advance, _idle_ratio)
_ADAMAX = Algorithm(_scalars, _advance, _direction, _IDLE)


def _variant(
    b1: Scalar, b2: Scalar, eps: Scalar, mu_dtype: StorageFormats, nu_dtype: StorageFormats
) -> Variant:
    check_decay("b1", b1)
    check_decay("b2", b2)
    check_not_negative("eps", eps)
    return variant(
        _ADAMAX,
        {"b1": Decay.of(b1), "b2": Decay.of(b2), "eps": eps},
        state=optax.ScaleByAdamState,
        mu_dtype=mu_dtype,
        nu_dtype=nu_dtype,
        mu_not_int8=_NO_MU_UNIT,
        nu_not_int8=f"u {MAXIMUM}",
    )


def scale_by_adamax(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    *,
    mu_dtype: StorageFormats = None,
    nu_dtype: StorageFormats = None,
) -> optax.GradientTransformationExtraArgs:
    """AdaMax's direction m^ / u, with neither sign nor learning rate.

    `adamax` gives the equations, the arguments and the errors. The state is
    `optax.ScaleByAdamState`, as in `scale_by_adam`, with u for `nu`: `mu` and `nu` are shaped
    like the parameters, float32, or bfloat16 where that is asked for.
    """
    return scale_by(_variant(b1, b2, eps, mu_dtype, nu_dtype))


def adamax(
    learning_rate: Rate,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    *,
    mu_dtype: StorageFormats = None,
    nu_dtype: StorageFormats = None,
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
    return descend(_variant(b1, b2, eps, mu_dtype, nu_dtype), learning_rate)


def adamaxw(
    learning_rate: Rate,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: Rate = 1e-4,
    mask: Mask | None = None,
    *,
    mu_dtype: StorageFormats = None,
    nu_dtype: StorageFormats = None,
) -> optax.GradientTransformationExtraArgs:
    """AdaMax with decoupled weight decay.

        update = -alpha (m / ((1 - b1^t) u) + weight_decay theta)

    `weight_decay` and `mask` are those of `adamw`, the other arguments, the state, dtypes and
    errors those of `adamax`. `update` needs the parameters theta.
    """
    return descend(_variant(b1, b2, eps, mu_dtype, nu_dtype), learning_rate, weight_decay, mask)

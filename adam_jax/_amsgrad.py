"""AMSGrad (Reddi, Kale and Kumar 2018, arXiv:1904.09237): the denominator never shrinks."""

from typing import Literal, NamedTuple

import jax.numpy as jnp
import optax

from adam_jax._checks import check_choice, check_decay, check_not_negative
from adam_jax._moments import Decay, abs_sq, bias_correction, decay, decayed, sqrt
from adam_jax._storage import Moment, Moments, storage_format
from adam_jax._transformation import Algorithm, descend, scale_by
from adam_jax._types import Leaf, LearningRate, RealLeaf, Scalar, StorageFormat

Maximum = Literal["raw", "corrected"]


NU_MAX_IS_A_MAXIMUM = (
    "nu_max is a maximum over time, and a maximum of numbers rounded at random keeps the largest "
    "rounding error, so that steps would be too short for good"
)


class _Settings(NamedTuple):
    b1: Decay
    b2: Decay
    eps: Scalar
    eps_root: Scalar
    correct_mu: bool
    correct_before: bool  # whether v is bias-corrected before the maximum is taken
    correct_after: bool  # or after


class _Scalars(NamedTuple):
    settings: _Settings
    unbias_m: Scalar
    before: Scalar
    after: Scalar


def _scalars(s: _Settings, t: RealLeaf) -> _Scalars:
    unbias_v = 1 / bias_correction(s.b2, t)
    return _Scalars(
        settings=s,
        unbias_m=jnp.where(s.correct_mu, 1 / bias_correction(s.b1, t), 1),
        before=jnp.where(s.correct_before, unbias_v, 1),
        after=jnp.where(s.correct_after, unbias_v, 1),
    )


def _advance(g: Leaf, moments: Moments, s: _Scalars) -> Moments:
    m, v, v_max = moments
    m = decayed(m, g, s.settings.b1)
    v = decayed(v, abs_sq(g), s.settings.b2)
    return m, v, jnp.maximum(v_max, v * s.before)


def _direction(g: Leaf, moments: Moments, s: _Scalars) -> Leaf:
    m, _, v_max = moments
    v_hat = v_max * s.after
    return m * s.unbias_m / (sqrt(v_hat + s.settings.eps_root) + s.settings.eps)


def _algorithm(
    b1: Scalar,
    b2: Scalar,
    eps: Scalar,
    eps_root: Scalar,
    mu_dtype: StorageFormat,
    bias_correction_mu: bool,
    bias_correction_nu: bool,
    maximum: Maximum,
    nu_dtype: StorageFormat,
) -> Algorithm:
    check_decay("b1", b1)
    check_decay("b2", b2)
    check_not_negative("eps", eps)
    check_not_negative("eps_root", eps_root)
    check_choice("maximum", maximum, ("raw", "corrected"))
    nu = Moment(storage_format("nu_dtype", nu_dtype, not_int8=NU_MAX_IS_A_MAXIMUM), real=True)
    corrected = maximum == "corrected"
    return Algorithm(
        state=optax.ScaleByAmsgradState,
        moments={
            "mu": Moment(storage_format("mu_dtype", mu_dtype), real=False),
            "nu": nu,
            "nu_max": nu,
        },
        settings=_Settings(
            b1=decay(b1),
            b2=decay(b2),
            eps=eps,
            eps_root=eps_root,
            correct_mu=bias_correction_mu,
            correct_before=bias_correction_nu and corrected,
            correct_after=bias_correction_nu and not corrected,
        ),
        scalars=_scalars,
        advance=_advance,
        direction=_direction,
    )


def scale_by_amsgrad(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: StorageFormat = None,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
    *,
    maximum: Maximum = "raw",
    nu_dtype: StorageFormat = None,
) -> optax.GradientTransformationExtraArgs:
    """AMSGrad's direction, with neither sign nor learning rate.

    `amsgrad` gives the equations, the arguments and the errors. The state is
    `optax.ScaleByAmsgradState`: that of `scale_by_adam` and `nu_max`, which is shaped and stored
    like `nu` and holds v_max.
    """
    return scale_by(
        _algorithm(
            b1,
            b2,
            eps,
            eps_root,
            mu_dtype,
            bias_correction_mu,
            bias_correction_nu,
            maximum,
            nu_dtype,
        )
    )


def amsgrad(
    learning_rate: LearningRate,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: StorageFormat = None,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
    *,
    maximum: Maximum = "raw",
    nu_dtype: StorageFormat = None,
) -> optax.GradientTransformationExtraArgs:
    """AMSGrad, after [Reddi, Kale and Kumar (2018)](https://arxiv.org/abs/1904.09237).

    As `adam`, but the denominator uses the largest v so far. There are two orders in use:

        maximum="raw" (torch)        v_max <- max(v_max, v)        v^ = v_max / (1 - b2^t)
        maximum="corrected" (optax)  v_max <- max(v_max, v / (1 - b2^t))        v^ = v_max

    They differ in the first 1 / (1 - b2) steps: "corrected" remembers the very first gradients
    at full weight and keeps the denominator at their size, "raw" lets the correction fall. A
    checkpoint written by `optax.amsgrad` continues with maximum="corrected".

    Args:
        learning_rate: alpha, as in `adam`.
        b1: as in `adam`.
        b2: as in `adam`.
        eps: as in `adam`.
        eps_root: as in `adam`.
        mu_dtype: as in `adam`.
        bias_correction_mu: False leaves m as it is, as in the AMSGrad paper.
        bias_correction_nu: False leaves v as it is, as in the AMSGrad paper; `maximum` then
            makes no difference.
        maximum: "raw" or "corrected": what the maximum is taken of.
        nu_dtype: how v and v_max are stored: None, "float32" or "bfloat16". Not "int8": a maximum
            of numbers rounded at random would keep the largest rounding error for good.

    Returns:
        An optax gradient transformation. Its state is that of `scale_by_amsgrad`, and equals that
        of `optax.amsgrad`, leaf for leaf.

    Raises:
        ValueError: as `adam`, and for any other `maximum`.
        TypeError: as `adam`.
    """
    return descend(
        _algorithm(
            b1,
            b2,
            eps,
            eps_root,
            mu_dtype,
            bias_correction_mu,
            bias_correction_nu,
            maximum,
            nu_dtype,
        ),
        learning_rate,
    )

"""AMSGrad (Reddi, Kale and Kumar 2018, arXiv:1904.09237): the denominator never shrinks."""

from typing import Literal, NamedTuple

import jax.numpy as jnp
import optax

from adam_jax._checks import check_choice, check_decay, check_not_negative
from adam_jax._codec import Moments
from adam_jax._moments import Blend, Decay, abs_sq, bias_correction, decayed, sqrt
from adam_jax._step import Algorithm, Idle, IdleTerms
from adam_jax._storage import MAXIMUM
from adam_jax._transformation import Variant, descend, scale_by, variant
from adam_jax._types import Leaf, Rate, RealLeaf, Scalar, StorageFormats

Maximum = Literal["raw", "corrected"]


class _Scalars(NamedTuple):
    """What all leaves have in common at a step; root = sqrt(1 - b2^t), or 1."""

    b1: Blend
    b2: Blend
    before: Scalar  # by which v is multiplied before the maximum is taken
    scale: Scalar  # root / (1 - b1^t)
    eps: Scalar  # times root
    eps_root: Scalar  # times root^2


def _scalars(
    t: RealLeaf,
    b1: Decay,
    b2: Decay,
    eps: Scalar,
    eps_root: Scalar,
    correct_mu: bool,
    correct_before: bool,
    correct_after: bool,
) -> _Scalars:
    correction = bias_correction(b2, t)
    after = jnp.where(correct_after, correction, 1)
    root = jnp.sqrt(after)
    return _Scalars(
        b1=Blend.of(b1),
        b2=Blend.of(b2),
        before=jnp.where(correct_before, 1 / correction, 1),
        scale=root / jnp.where(correct_mu, bias_correction(b1, t), 1),
        eps=eps * root,
        eps_root=jnp.where(eps_root == 0, 0, eps_root * after),
    )


def _advance(g: Leaf, moments: Moments, s: _Scalars) -> Moments:
    m, v, v_max = moments
    v = decayed(v, abs_sq(g), s.b2)
    return decayed(m, g, s.b1), v, jnp.maximum(v_max, v * s.before)


def _direction(g: Leaf, moments: Moments, s: _Scalars) -> Leaf:
    m, _, v_max = moments
    return m * s.scale / (sqrt(v_max + s.eps_root) + s.eps)


def _idle_root(moments: Moments) -> RealLeaf:
    return sqrt(moments[2])


def _idle_terms(s: _Scalars, p1: RealLeaf, p2: RealLeaf) -> IdleTerms:
    return IdleTerms(p1 * s.scale, jnp.asarray(s.eps))


def _idle_advance(moments: Moments, p1: RealLeaf, p2: RealLeaf, s: _Scalars) -> Moments:
    m, v, v_max = moments  # v only falls, and so does v / (1 - b2^t)
    return m * p1, v * p2, v_max


def _idle_ratio(b1: float, b2: float) -> float:
    return b1


_IDLE = Idle(_idle_root, _idle_terms, _idle_advance, _idle_ratio)
_AMSGRAD = Algorithm(_scalars, _advance, _direction, _IDLE)


def _variant(
    b1: Scalar,
    b2: Scalar,
    eps: Scalar,
    eps_root: Scalar,
    mu_dtype: StorageFormats,
    nu_dtype: StorageFormats,
    bias_correction_mu: bool,
    bias_correction_nu: bool,
    maximum: Maximum,
) -> Variant:
    check_decay("b1", b1)
    check_decay("b2", b2)
    check_not_negative("eps", eps)
    check_not_negative("eps_root", eps_root)
    check_choice("maximum", maximum, ("raw", "corrected"))
    return variant(
        _AMSGRAD,
        {
            "b1": Decay.of(b1),
            "b2": Decay.of(b2),
            "eps": eps,
            "eps_root": eps_root,
            "correct_mu": bias_correction_mu,
            "correct_before": bias_correction_nu and maximum == "corrected",
            "correct_after": bias_correction_nu and maximum == "raw",
        },
        state=optax.ScaleByAmsgradState,
        mu_dtype=mu_dtype,
        nu_dtype=nu_dtype,
        nu_not_int8=f"nu_max {MAXIMUM}",
    )


def scale_by_amsgrad(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: StorageFormats = None,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
    *,
    maximum: Maximum = "raw",
    nu_dtype: StorageFormats = None,
) -> optax.GradientTransformationExtraArgs:
    """AMSGrad's direction, with neither sign nor learning rate.

    `amsgrad` gives the equations, the arguments and the errors. The state is
    `optax.ScaleByAmsgradState`: that of `scale_by_adam` and `nu_max`, which is shaped and stored
    like `nu` and holds v_max.
    """
    return scale_by(
        _variant(
            b1=b1,
            b2=b2,
            eps=eps,
            eps_root=eps_root,
            mu_dtype=mu_dtype,
            nu_dtype=nu_dtype,
            bias_correction_mu=bias_correction_mu,
            bias_correction_nu=bias_correction_nu,
            maximum=maximum,
        )
    )


def amsgrad(
    learning_rate: Rate,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: StorageFormats = None,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
    *,
    maximum: Maximum = "raw",
    nu_dtype: StorageFormats = None,
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
        _variant(
            b1=b1,
            b2=b2,
            eps=eps,
            eps_root=eps_root,
            mu_dtype=mu_dtype,
            nu_dtype=nu_dtype,
            bias_correction_mu=bias_correction_mu,
            bias_correction_nu=bias_correction_nu,
            maximum=maximum,
        ),
        learning_rate,
    )

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
    """The numbers that all leaves share at a step; root = sqrt(1 - b2^t), or 1."""

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
    r"""Returns AMSGrad's direction, without learning rate.

    That is $\hat m / (\sqrt{\hat v + \epsilon_r} + \epsilon)$ with the $\hat v$ of `amsgrad`, for a
    chain of your own. It has the gradient's sign: scale it by a negative number to descend. The
    state is an `optax.ScaleByAmsgradState`: `count`, `mu` and `nu` of `scale_by_adam`, and
    `nu_max`, which holds $v_\text{max}$ and is shaped and stored like `nu`.

    Args:
        b1: decay rate $\beta_1$ of the first moment, in [0, 1).
        b2: decay rate $\beta_2$ of the second raw moment, in [0, 1).
        eps: $\epsilon$, added to the denominator, in units of the gradient.
        eps_root: $\epsilon_r$, added inside the square root, in units of the squared gradient.
        mu_dtype: storage format of mu: `"float32"`, `"bfloat16"` or `"int8"`. None is float32.
        bias_correction_mu: whether to divide $m$ by $1 - \beta_1^t$.
        bias_correction_nu: whether to divide $v$ by $1 - \beta_2^t$.
        maximum: take the maximum of the `"raw"` $v$, or of the bias-`"corrected"` one.
        nu_dtype: storage format of nu and nu_max: `"float32"` or `"bfloat16"`. None is float32.

    Returns:
        An optax gradient transformation. Its updates have the shapes and dtypes of the gradients.

    Raises:
        ValueError: at construction, for a hyperparameter out of range, another `maximum`, or a
            storage format that does not exist or (nu in int8) does not work here; in `update`, for
            gradients or a state that do not fit.
        TypeError: for a parameter or gradient of integer dtype, and for a complex parameter with mu
            in bfloat16 or int8. The message names the leaf's path.

    Examples:
        >>> import adam_jax, jax.numpy as jnp, optax
        >>> optimizer = optax.chain(adam_jax.scale_by_amsgrad(), optax.scale(-0.1))
        >>> params = jnp.array([1.0, -2.0])
        >>> updates, state = optimizer.update(2 * params, optimizer.init(params))
        >>> updates
        Array([-0.1,  0.1], dtype=float32)
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
    r"""Builds AMSGrad, after [Reddi, Kale and Kumar (2018)](https://arxiv.org/abs/1904.09237).

    This is `adam` with the largest $v$ so far in the denominator. Two orders are in use:

    - `maximum="raw"`, as in torch: $v_\text{max} \leftarrow \max(v_\text{max}, v)$, then
      $\hat v = v_\text{max} / (1 - \beta_2^t)$.
    - `maximum="corrected"`, as in optax:
      $v_\text{max} \leftarrow \max(v_\text{max}, v / (1 - \beta_2^t))$, then
      $\hat v = v_\text{max}$.

    They differ in the first $1 / (1 - \beta_2)$ steps. "corrected" remembers the very first
    gradients at full weight and keeps the denominator at their size; "raw" lets the correction
    fall. A checkpoint written by `optax.amsgrad` continues with `maximum="corrected"`.

    Args:
        learning_rate: $\alpha$, in units of the parameters: a number, a schedule (a function of the
            step count, from 0), or a tree of these that is a prefix of the parameter tree.
        b1: decay rate $\beta_1$ of the first moment, in [0, 1).
        b2: decay rate $\beta_2$ of the second raw moment, in [0, 1).
        eps: $\epsilon$, added to the denominator, in units of the gradient.
        eps_root: $\epsilon_r$, added inside the square root, in units of the squared gradient.
        mu_dtype: storage format of mu: `"float32"`, `"bfloat16"`, `"int8"`, or a tree of these.
            None is float32.
        bias_correction_mu: whether to divide $m$ by $1 - \beta_1^t$. False is the AMSGrad paper's.
        bias_correction_nu: whether to divide $v$ by $1 - \beta_2^t$. False is the AMSGrad paper's;
            `maximum` then makes no difference.
        maximum: take the maximum of the `"raw"` $v$, or of the bias-`"corrected"` one.
        nu_dtype: storage format of nu and nu_max: `"float32"` or `"bfloat16"`; None is float32. Not
            `"int8"`: a maximum of stochastically rounded numbers would keep the largest rounding
            error.

    Returns:
        An optax gradient transformation. Its state equals that of `optax.amsgrad`, leaf for leaf;
        `scale_by_amsgrad` describes it.

    Raises:
        ValueError: at construction, for a hyperparameter out of range, another `maximum`, or a
            storage format that does not exist or (nu in int8) does not work here; in `update`, for
            gradients or a state that do not fit.
        TypeError: for a parameter or gradient of integer dtype, and for a complex parameter with mu
            in bfloat16 or int8. The message names the leaf's path.

    Examples:
        >>> import adam_jax, jax.numpy as jnp, optax
        >>> optimizer = adam_jax.amsgrad(0.1)
        >>> params = jnp.array([1.0, -2.0])
        >>> updates, state = optimizer.update(2 * params, optimizer.init(params))
        >>> optax.apply_updates(params, updates)
        Array([ 0.9, -1.9], dtype=float32)
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

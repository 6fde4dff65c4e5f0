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
    """The numbers that all leaves share at a step."""

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
    # With eps = 0, u stays 0 until the first nonzero gradient. Until then there is no step, and the
    # derivative has no NaN. The division comes last: a choice after it would keep compilers from
    # fusing the product with the learning rate and the sum that follows, in some programs and not
    # in others.
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
    r"""Returns AdaMax's direction $\hat m / u$, without learning rate.

    For a chain of your own; `adamax` gives the equations. The direction has the gradient's sign:
    scale it by a negative number to descend. The state is an `optax.ScaleByAdamState`: `count`
    (int32, shape ()), `mu` with $m$, and `nu` with $u$. Both moments are shaped like the
    parameters, float32 or bfloat16 (wider for wider parameters; a complex parameter's mu is
    complex).

    Args:
        b1: decay rate $\beta_1$ of the first moment, in [0, 1).
        b2: decay rate $\beta_2$ of the infinity norm, in [0, 1).
        eps: $\epsilon$, added to $|g|$, in units of the gradient.
        mu_dtype: storage format of mu: `"float32"` or `"bfloat16"`. None is float32.
        nu_dtype: storage format of nu: the same choices.

    Returns:
        An optax gradient transformation. Its updates have the shapes and dtypes of the gradients.

    Raises:
        ValueError: at construction, for a hyperparameter out of range, `"int8"` or an unknown
            storage format; in `update`, for gradients or a state that do not fit.
        TypeError: for a parameter or gradient of integer dtype, and for a complex parameter with mu
            in bfloat16. The message names the leaf's path.

    Examples:
        >>> import adam_jax, jax.numpy as jnp, optax
        >>> optimizer = optax.chain(adam_jax.scale_by_adamax(), optax.scale(-0.1))
        >>> params = jnp.array([1.0, -2.0])
        >>> updates, state = optimizer.update(2 * params, optimizer.init(params))
        >>> [f"{x:.3f}" for x in updates]
        ['-0.100', '0.100']
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
    r"""Builds AdaMax, Algorithm 2 of [Kingma and Ba (2015)](https://arxiv.org/abs/1412.6980).

    The first moment is Adam's. An exponentially weighted infinity norm $u$ takes the place of the
    second:

    $$m \leftarrow \beta_1 m + (1 - \beta_1)\, g$$

    $$u \leftarrow \max(\beta_2 u, |g| + \epsilon)$$

    $$\text{update} = -\frac{\alpha}{1 - \beta_1^t} \cdot \frac{m}{u}$$

    If b1 < b2, no step is longer than $\alpha\, \beta_2 (1 - \beta_1) / (\beta_2 - \beta_1)$:
    1.009 $\alpha$ with the defaults, where the paper says $\alpha$. $u$ needs no bias correction.
    optax and torch added the eps inside the maximum to the paper's algorithm. With eps = 0, a
    coordinate whose gradients have all been zero has $u = 0$ and does not move.

    Args:
        learning_rate: $\alpha$, in units of the parameters: a number, a schedule (a function of the
            step count, from 0), or a tree of these that is a prefix of the parameter tree. The
            paper suggests 0.002.
        b1: decay rate $\beta_1$ of the first moment, in [0, 1).
        b2: decay rate $\beta_2$ of the infinity norm, in [0, 1).
        eps: $\epsilon$, added to $|g|$, in units of the gradient.
        mu_dtype: storage format of mu: `"float32"` or `"bfloat16"`; None is float32. Not `"int8"`:
            its codes count in square roots of a second raw moment, which AdaMax does not have.
        nu_dtype: storage format of nu, which holds $u$: the same choices. Not `"int8"`: a maximum
            of stochastically rounded numbers would keep the largest rounding error.

    Returns:
        An optax gradient transformation. Its state equals that of `optax.adamax`, leaf for leaf;
        `scale_by_adamax` describes it.

    Raises:
        ValueError: at construction, for a hyperparameter out of range, `"int8"` or an unknown
            storage format; in `update`, for gradients or a state that do not fit.
        TypeError: for a parameter or gradient of integer dtype, and for a complex parameter with mu
            in bfloat16. The message names the leaf's path.

    Examples:
        >>> import adam_jax, jax.numpy as jnp, optax
        >>> optimizer = adam_jax.adamax(0.1)
        >>> params = jnp.array([1.0, -2.0])
        >>> updates, state = optimizer.update(2 * params, optimizer.init(params))
        >>> optax.apply_updates(params, updates)
        Array([ 0.9, -1.9], dtype=float32)
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
    r"""Builds AdaMax with decoupled weight decay.

    With decay $\lambda$ = `weight_decay`, parameter $\theta$, and $m$ and $u$ of `adamax`,

    $$\text{update} = -\alpha \left( \frac{m}{(1 - \beta_1^t)\, u} + \lambda\, \theta \right)$$

    `update` needs the parameters.

    Args:
        learning_rate: $\alpha$, in units of the parameters: a number, a schedule (a function of the
            step count, from 0), or a tree of these that is a prefix of the parameter tree.
        b1: decay rate $\beta_1$ of the first moment, in [0, 1).
        b2: decay rate $\beta_2$ of the infinity norm, in [0, 1).
        eps: $\epsilon$, added to $|g|$, in units of the gradient.
        weight_decay: $\lambda$, which the learning rate multiplies: a number, a schedule or a tree
            of these.
        mask: which leaves decay: a tree of bools that is a prefix of the parameter tree, or a
            function from the parameters to one. None: all of them.
        mu_dtype: storage format of mu: `"float32"` or `"bfloat16"`. None is float32.
        nu_dtype: storage format of nu, which holds $u$: the same choices.

    Returns:
        An optax gradient transformation. Its state equals that of `optax.adamaxw`, leaf for leaf.

    Raises:
        ValueError: at construction, for a hyperparameter out of range, `"int8"` or an unknown
            storage format; in `update`, without parameters, or for gradients or a state that do not
            fit.
        TypeError: for a parameter or gradient of integer dtype, and for a complex parameter with mu
            in bfloat16. The message names the leaf's path.

    Examples:
        >>> import adam_jax, jax.numpy as jnp, optax
        >>> optimizer = adam_jax.adamaxw(0.1, weight_decay=0.1)
        >>> params = jnp.array([1.0, -2.0])
        >>> updates, state = optimizer.update(2 * params, optimizer.init(params), params)
        >>> optax.apply_updates(params, updates)
        Array([ 0.89, -1.88], dtype=float32)
    """
    return descend(_variant(b1, b2, eps, mu_dtype, nu_dtype), learning_rate, weight_decay, mask)

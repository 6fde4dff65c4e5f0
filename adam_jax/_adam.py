"""Adam (Algorithm 1 of Kingma and Ba, arXiv:1412.6980) and its variants that differ in a line."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import optax

from adam_jax._checks import check_decay, check_not_negative
from adam_jax._codec import Moments
from adam_jax._moments import Blend, Decay, abs_sq, bias_correction, decayed, sqrt
from adam_jax._step import Algorithm, Idle, IdleTerms
from adam_jax._transformation import Variant, descend, scale_by, variant
from adam_jax._types import Leaf, Mask, Rate, RealLeaf, Scalar, StorageFormats


class _Scalars(NamedTuple):
    """The numbers that all leaves share at a step.

    The end of section 2 of the paper moves both bias corrections out of the leaf:
    m^ / (sqrt(v^) + eps) is m scale / (sqrt(v) + eps root) with root = sqrt(1 - b2^t).
    """

    b1: Blend
    b2: Blend
    scale: Scalar  # root / (1 - b1^t)
    now: Scalar  # (1 - b1) scale, and
    ahead: Scalar  # b1 root / (1 - b1^(t+1)), for Nesterov's look ahead
    eps: Scalar  # times root
    eps_root: Scalar  # times root^2


def _scalars(t: RealLeaf, b1: Decay, b2: Decay, eps: Scalar, eps_root: Scalar) -> _Scalars:
    correction = bias_correction(b2, t)
    root = jnp.sqrt(correction)
    scale = root / bias_correction(b1, t)
    return _Scalars(
        b1=Blend.of(b1),
        b2=Blend.of(b2),
        scale=scale,
        now=b1.one_minus_b * scale,
        ahead=b1.b * root / bias_correction(b1, t + 1),
        eps=eps * root,
        eps_root=jnp.where(eps_root == 0, 0, eps_root * correction),
    )


def _advance(g: Leaf, moments: Moments, s: _Scalars) -> Moments:
    m, v = moments
    return decayed(m, g, s.b1), decayed(v, abs_sq(g), s.b2)


def _direction(g: Leaf, moments: Moments, s: _Scalars) -> Leaf:
    m, v = moments
    return m * s.scale / (sqrt(v + s.eps_root) + s.eps)


def _nesterov_direction(g: Leaf, moments: Moments, s: _Scalars) -> Leaf:
    m, v = moments
    m_hat = m * s.ahead + g * s.now
    return m_hat / (sqrt(v + s.eps_root) + s.eps)


def _idle_root(moments: Moments) -> RealLeaf:
    return sqrt(moments[1])


def _idle_terms(s: _Scalars, p1: RealLeaf, p2: RealLeaf) -> IdleTerms:
    shrunk = jnp.sqrt(p2)
    return IdleTerms(p1 * s.scale / shrunk, s.eps / shrunk)


def _idle_nesterov_terms(s: _Scalars, p1: RealLeaf, p2: RealLeaf) -> IdleTerms:
    shrunk = jnp.sqrt(p2)
    return IdleTerms(p1 * s.ahead / shrunk, s.eps / shrunk)


def _idle_advance(moments: Moments, p1: RealLeaf, p2: RealLeaf, s: _Scalars) -> Moments:
    m, v = moments
    return m * p1, v * p2


def _idle_ratio(b1: float, b2: float) -> float:
    return b1 / math.sqrt(b2) if b2 else math.inf


_IDLE = Idle(_idle_root, _idle_terms, _idle_advance, _idle_ratio)
_ADAM = Algorithm(_scalars, _advance, _direction, _IDLE)
_NADAM = Algorithm(
    _scalars, _advance, _nesterov_direction, _IDLE._replace(terms=_idle_nesterov_terms)
)


def _variant(
    b1: Scalar,
    b2: Scalar,
    eps: Scalar,
    eps_root: Scalar,
    mu_dtype: StorageFormats,
    nu_dtype: StorageFormats,
    nesterov: bool,
) -> Variant:
    check_decay("b1", b1)
    check_decay("b2", b2)
    check_not_negative("eps", eps)
    check_not_negative("eps_root", eps_root)
    return variant(
        _NADAM if nesterov else _ADAM,
        {"b1": Decay.of(b1), "b2": Decay.of(b2), "eps": eps, "eps_root": eps_root},
        state=optax.ScaleByAdamState,
        mu_dtype=mu_dtype,
        nu_dtype=nu_dtype,
    )


def scale_by_adam(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: StorageFormats = None,
    nu_dtype: StorageFormats = None,
    *,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Returns Adam's direction $\hat m / (\sqrt{\hat v} + \epsilon)$, without learning rate.

    A drop-in for `optax.scale_by_adam`, for a chain of your own. The direction has the gradient's
    sign: scale it by a negative number to descend. `adam` gives the equations and describes the
    storage formats. The state is an `optax.ScaleByAdamState`:

    - `count`: int32, shape (), the step count $t$;
    - `mu`: the first moment $m$, shaped like the parameters, float32 (complex64 for a complex
      parameter, float64 or complex128 for one of those dtypes);
    - `nu`: the second raw moment $v$, with the same shapes, real.

    With `mu_dtype` or `nu_dtype`, these are bfloat16 or int8 codes; with int8, `nu` is an
    `Int8Moment`. Each step uses the moments as they are stored.

    Args:
        b1: decay rate $\beta_1$ of the first moment, in [0, 1).
        b2: decay rate $\beta_2$ of the second raw moment, in [0, 1).
        eps: $\epsilon$, added to the denominator, in units of the gradient.
        eps_root: $\epsilon_r$, added inside the square root, in units of the squared gradient.
        mu_dtype: storage format of mu: `"float32"`, `"bfloat16"` or `"int8"`. None is float32.
        nu_dtype: storage format of nu: the same choices.
        nesterov: look one step of $m$ ahead, as `nadam` does.

    Returns:
        An optax gradient transformation. Its updates have the shapes and dtypes of the gradients.

    Raises:
        ValueError: at construction, for a hyperparameter out of range or an unknown storage format;
            in `update`, for gradients or a state that do not fit.
        TypeError: for a parameter or gradient of integer dtype, and for a complex parameter with mu
            in bfloat16 or int8. The message names the leaf's path.

    Examples:
        >>> import adam_jax, jax.numpy as jnp, optax
        >>> optimizer = optax.chain(adam_jax.scale_by_adam(), optax.scale(-0.1))
        >>> params = jnp.array([1.0, -2.0])
        >>> updates, state = optimizer.update(2 * params, optimizer.init(params))
        >>> updates
        Array([-0.1,  0.1], dtype=float32)
    """
    return scale_by(_variant(b1, b2, eps, eps_root, mu_dtype, nu_dtype, nesterov))


def adam(
    learning_rate: Rate,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: StorageFormats = None,
    nu_dtype: StorageFormats = None,
    *,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Builds Adam, Algorithm 1 of [Kingma and Ba (2015)](https://arxiv.org/abs/1412.6980).

    With gradient $g$, step count $t$ (from 1), learning rate $\alpha$ and $\epsilon_r$ =
    `eps_root`, each coordinate follows

    $$
    \begin{aligned}
    m &\leftarrow \beta_1 m + (1 - \beta_1)\, g & \hat m &= m / (1 - \beta_1^t) \\
    v &\leftarrow \beta_2 v + (1 - \beta_2)\, |g|^2 & \hat v &= v / (1 - \beta_2^t)
    \end{aligned}
    $$

    $$\text{update} = -\alpha\, \hat m / (\sqrt{\hat v + \epsilon_r} + \epsilon)$$

    in float32 (float64 for float64 leaves), whatever the dtype of parameters and gradients. The
    update has the gradient's dtype and is rounded to it once. A coordinate whose gradients have all
    been 0 does not move, even with eps = eps_root = 0.

    **Storage formats.** The state keeps $m$ as `mu` and $v$ as `nu`. `"bfloat16"` takes 2 bytes per
    parameter and `"int8"` takes 1. Both use unbiased stochastic rounding, and the arithmetic stays
    in float32. In int8, nu has one float32 scale for each row (the last axis), so a NaN gradient
    poisons its row; a leaf of fewer than 4096 elements, or with a last axis shorter than 32, stays
    in float32. Derivatives do not go through rounded moments.

    Args:
        learning_rate: $\alpha$, in units of the parameters: a number, a 0-d array or tracer, a
            schedule (a function of the step count, from 0), or a tree of these, made of the
            parameters' containers, that is a prefix of the parameter tree: a rate per subtree.
        b1: decay rate $\beta_1$ of the first moment, in [0, 1).
        b2: decay rate $\beta_2$ of the second raw moment, in [0, 1).
        eps: $\epsilon$, added to the denominator, in units of the gradient.
        eps_root: $\epsilon_r$, added inside the square root, in units of the squared gradient.
        mu_dtype: storage format of mu: `"float32"`, `"bfloat16"` or `"int8"`, the dtype of that
            name, or a tree of these that is a prefix of the parameter tree. None is float32, or
            float64 for float64 and complex128 parameters. A complex parameter's mu cannot be in
            bfloat16 or int8.
        nu_dtype: storage format of nu: the same choices, for complex parameters too.
        nesterov: look one step of $m$ ahead, as `nadam` does.

    Returns:
        An optax gradient transformation. Its state equals that of `optax.adam`, leaf for leaf;
        `scale_by_adam` describes it. A leaf whose gradient is `None` gets the update `None` and
        keeps its moments; `optax.apply_updates` accepts that only where the parameter is `None`
        too. A finite gradient counts as at most $2^{63}$ in magnitude, so its square stays finite.
        An infinite or NaN gradient poisons the moments, unless `optax.apply_if_finite` keeps it
        out.

    Raises:
        ValueError: at construction, for a concrete hyperparameter out of range or an unknown
            storage format; in `update`, for gradients that do not fit the state, or a state in
            another storage format (see `convert_state`).
        TypeError: for a parameter or gradient of integer dtype, and for a complex parameter with mu
            in bfloat16 or int8. The message names the leaf's path.

    Examples:
        >>> import adam_jax, jax, jax.numpy as jnp, optax
        >>> optimizer = adam_jax.adam(learning_rate=0.1)
        >>> params = jnp.array([1.0, -2.0])
        >>> state = optimizer.init(params)
        >>> gradients = jax.grad(lambda x: jnp.sum(x**2))(params)
        >>> updates, state = optimizer.update(gradients, state, params)
        >>> optax.apply_updates(params, updates)
        Array([ 0.9, -1.9], dtype=float32)
    """
    return descend(_variant(b1, b2, eps, eps_root, mu_dtype, nu_dtype, nesterov), learning_rate)


def adamw(
    learning_rate: Rate,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: StorageFormats = None,
    weight_decay: Rate = 1e-4,
    mask: Mask | None = None,
    *,
    nu_dtype: StorageFormats = None,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Builds AdamW: Adam with decoupled weight decay.

    From [Loshchilov and Hutter (2019)](https://arxiv.org/abs/1711.05101). With decay $\lambda$ =
    `weight_decay`, parameter $\theta$, and $\hat m$ and $\hat v$ of `adam`,

    $$\text{update} = -\alpha \left( \frac{\hat m}{\sqrt{\hat v + \epsilon_r} + \epsilon}
    + \lambda\, \theta \right)$$

    `update` needs the parameters. `adam` describes dtypes and storage formats.

    Args:
        learning_rate: $\alpha$, in units of the parameters: a number, a schedule (a function of the
            step count, from 0), or a tree of these that is a prefix of the parameter tree.
        b1: decay rate $\beta_1$ of the first moment, in [0, 1).
        b2: decay rate $\beta_2$ of the second raw moment, in [0, 1).
        eps: $\epsilon$, added to the denominator, in units of the gradient.
        eps_root: $\epsilon_r$, added inside the square root, in units of the squared gradient.
        mu_dtype: storage format of mu: `"float32"`, `"bfloat16"`, `"int8"`, or a tree of these.
            None is float32.
        weight_decay: $\lambda$, which the learning rate multiplies, as in optax and torch: a
            number, a schedule or a tree of these. The default is optax's; torch's is 1e-2.
        mask: which leaves decay: a tree of bools that is a prefix of the parameter tree, or a
            function from the parameters to one. None: all of them.
        nu_dtype: storage format of nu: the same choices as for mu.
        nesterov: look one step of $m$ ahead, as `nadamw` does.

    Returns:
        An optax gradient transformation. Its state equals that of `optax.adamw`, leaf for leaf.

    Raises:
        ValueError: at construction, for a hyperparameter out of range or an unknown storage format;
            in `update`, without parameters, or for gradients or a state that do not fit.
        TypeError: for a parameter or gradient of integer dtype, and for a complex parameter with mu
            in bfloat16 or int8. The message names the leaf's path.

    Examples:
        >>> import adam_jax, jax.numpy as jnp, optax
        >>> optimizer = adam_jax.adamw(0.1, weight_decay=0.01, mask={"w": True, "b": False})
        >>> params = {"w": jnp.array([1.0]), "b": jnp.array([1.0])}
        >>> updates, state = optimizer.update(params, optimizer.init(params), params)
        >>> optax.apply_updates(params, updates)
        {'b': Array([0.9], dtype=float32), 'w': Array([0.899], dtype=float32)}
    """
    return descend(
        _variant(b1, b2, eps, eps_root, mu_dtype, nu_dtype, nesterov),
        learning_rate,
        weight_decay,
        mask,
    )


def nadam(
    learning_rate: Rate,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: StorageFormats = None,
    nu_dtype: StorageFormats = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Builds NAdam, [Dozat (2016)](https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ).

    This is `adam` with `nesterov=True`. Where Adam steps along $\hat m$, NAdam looks one step of
    $m$ ahead:

    $$\hat m = \frac{\beta_1 m}{1 - \beta_1^{t+1}} + \frac{(1 - \beta_1)\, g}{1 - \beta_1^t}$$

    $$\text{update} = -\alpha\, \hat m / (\sqrt{\hat v + \epsilon_r} + \epsilon)$$

    Dozat's report also warms b1 up over the first few hundred steps (torch's `momentum_decay`).
    Neither optax nor this function does. `adam` describes dtypes and storage formats.

    Args:
        learning_rate: $\alpha$, in units of the parameters: a number, a schedule (a function of the
            step count, from 0), or a tree of these that is a prefix of the parameter tree.
        b1: decay rate $\beta_1$ of the first moment, in [0, 1).
        b2: decay rate $\beta_2$ of the second raw moment, in [0, 1).
        eps: $\epsilon$, added to the denominator, in units of the gradient.
        eps_root: $\epsilon_r$, added inside the square root, in units of the squared gradient.
        mu_dtype: storage format of mu: `"float32"`, `"bfloat16"`, `"int8"`, or a tree of these.
            None is float32.
        nu_dtype: storage format of nu: the same choices.

    Returns:
        An optax gradient transformation. Its state equals that of `optax.nadam`, leaf for leaf.

    Raises:
        ValueError: at construction, for a hyperparameter out of range or an unknown storage format;
            in `update`, for gradients or a state that do not fit.
        TypeError: for a parameter or gradient of integer dtype, and for a complex parameter with mu
            in bfloat16 or int8. The message names the leaf's path.

    Examples:
        >>> import adam_jax, jax.numpy as jnp
        >>> optimizer = adam_jax.nadam(0.1)
        >>> params = jnp.array([1.0, -2.0])
        >>> updates, state = optimizer.update(2 * params, optimizer.init(params))
        >>> [f"{x:.4f}" for x in updates]
        ['-0.1474', '0.1474']
    """
    return adam(learning_rate, b1, b2, eps, eps_root, mu_dtype, nu_dtype, nesterov=True)


def nadamw(
    learning_rate: Rate,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: StorageFormats = None,
    weight_decay: Rate = 1e-4,
    mask: Mask | None = None,
    *,
    nu_dtype: StorageFormats = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Builds NAdam with decoupled weight decay: `adamw` with `nesterov=True`.

    With the $\hat m$ of `nadam`,

    $$\text{update} = -\alpha \left( \frac{\hat m}{\sqrt{\hat v + \epsilon_r} + \epsilon}
    + \lambda\, \theta \right)$$

    `update` needs the parameters. `adam` describes dtypes and storage formats.

    Args:
        learning_rate: $\alpha$, in units of the parameters: a number, a schedule (a function of the
            step count, from 0), or a tree of these that is a prefix of the parameter tree.
        b1: decay rate $\beta_1$ of the first moment, in [0, 1).
        b2: decay rate $\beta_2$ of the second raw moment, in [0, 1).
        eps: $\epsilon$, added to the denominator, in units of the gradient.
        eps_root: $\epsilon_r$, added inside the square root, in units of the squared gradient.
        mu_dtype: storage format of mu: `"float32"`, `"bfloat16"`, `"int8"`, or a tree of these.
            None is float32.
        weight_decay: $\lambda$, which the learning rate multiplies: a number, a schedule or a tree
            of these.
        mask: which leaves decay: a tree of bools that is a prefix of the parameter tree, or a
            function from the parameters to one. None: all of them.
        nu_dtype: storage format of nu: the same choices as for mu.

    Returns:
        An optax gradient transformation. Its state equals that of `optax.nadamw`, leaf for leaf.

    Raises:
        ValueError: at construction, for a hyperparameter out of range or an unknown storage format;
            in `update`, without parameters, or for gradients or a state that do not fit.
        TypeError: for a parameter or gradient of integer dtype, and for a complex parameter with mu
            in bfloat16 or int8. The message names the leaf's path.

    Examples:
        >>> import adam_jax, jax.numpy as jnp
        >>> optimizer = adam_jax.nadamw(0.1, weight_decay=0.1)
        >>> params = jnp.array([1.0, -2.0])
        >>> updates, state = optimizer.update(2 * params, optimizer.init(params), params)
        >>> [f"{x:.4f}" for x in updates]
        ['-0.1574', '0.1674']
    """
    return adamw(
        learning_rate, b1, b2, eps, eps_root, mu_dtype, weight_decay, mask,
        nu_dtype=nu_dtype, nesterov=True,
    )  # fmt: skip

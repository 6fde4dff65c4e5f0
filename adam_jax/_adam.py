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
    """What all leaves have in common at a step.

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
    r"""Adam's direction m^ / (sqrt(v^) + eps), with neither sign nor learning rate.

    A drop-in for `optax.scale_by_adam`, to put into a chain of your own. `adam` gives the
    equations, the arguments and the errors. Its state is `optax.ScaleByAdamState`:

    - `count`: int32, shape (), the step count t;
    - `mu`: the first moment m, shaped like the parameters, float32 (complex64 for a complex
      parameter, float64 or complex128 for one of those dtypes);
    - `nu`: the second raw moment v, shaped alike, real.

    With `mu_dtype` or `nu_dtype` they are bfloat16, or int8 codes, in which case `nu` is an
    `Int8Moment` of two trees. Each step is taken from the moments as they are stored.

    Args:
        b1: as in `adam`.
        b2: as in `adam`.
        eps: as in `adam`.
        eps_root: as in `adam`.
        mu_dtype: as in `adam`.
        nu_dtype: as in `adam`.
        nesterov: as in `adam`.

    Returns:
        An optax gradient transformation. Its updates are shaped like the gradients, in their
        dtype.

    Raises:
        ValueError: as `adam`.
        TypeError: as `adam`.
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
    r"""Adam, Algorithm 1 of [Kingma and Ba (2015)](https://arxiv.org/abs/1412.6980).

    With gradient g, step count t (from 1) and learning rate alpha, each coordinate follows

        m <- b1 m + (1 - b1) g                 m^ = m / (1 - b1^t)
        v <- b2 v + (1 - b2) |g|^2             v^ = v / (1 - b2^t)
        update = -alpha m^ / (sqrt(v^ + eps_root) + eps)

    in float32 (float64 for float64 leaves), whatever the dtype of parameters and gradients.
    The update has the gradient's dtype and is rounded to it once. A coordinate whose gradients
    have all been 0 does not move, with eps = eps_root = 0 either.

    Args:
        learning_rate: alpha, in units of the parameters. A number, a 0-d array or tracer, a
            schedule (a function of the step count, from 0), or a tree of these that is a prefix
            of the parameter tree, made of the same containers: one rate for each subtree.
        b1: decay rate of the first moment, in [0, 1).
        b2: decay rate of the second raw moment, in [0, 1).
        eps: added to the denominator, in units of the gradient.
        eps_root: added inside the square root, in units of the gradient squared.
        mu_dtype: how m is stored between steps: "float32", "bfloat16" or "int8", or the dtype of
            that name. None is float32, and float64 for float64 and complex128 parameters.
            bfloat16 and int8 are rounded at random, right on average. They take 2 bytes and 1
            per parameter; in int8, a leaf of fewer than 4096 elements, or with a last axis
            shorter than 32, stays in float32. Not for complex parameters. Arithmetic is float32
            all the same, and derivatives do not go through what is rounded.
        nu_dtype: how v is stored, likewise. In int8 there is a float32 scale for each row (the
            last axis), so that a NaN gradient poisons its row.
        nesterov: replace m^ by b1 m / (1 - b1^(t+1)) + (1 - b1) g / (1 - b1^t), after
            [Dozat (2016)](https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ).

    Returns:
        An optax gradient transformation. Its state equals that of `optax.adam`, leaf for leaf:
        `scale_by_adam` describes it. A leaf whose gradient is `None` gets the update `None` and
        keeps its moments; `optax.apply_updates` takes that only where the parameter is `None`
        too. A finite gradient counts as at most 2^63 in magnitude, so that its square is finite;
        an infinite or NaN one poisons the moments, unless `optax.apply_if_finite` keeps it out.

    Raises:
        ValueError: when called, for a concrete hyperparameter outside its range or an unknown
            storage format; in `update`, for gradients that do not fit the state, or a state in
            another storage format (see `convert_state`).
        TypeError: for a parameter or gradient of integer dtype, naming its path, and for a
            complex parameter whose m would be in bfloat16 or int8.

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
    r"""Adam with decoupled weight decay, [Loshchilov and Hutter](https://arxiv.org/abs/1711.05101).

        update = -alpha (m^ / (sqrt(v^ + eps_root) + eps) + weight_decay theta)

    Everything else is as in `adam`. `update` needs the parameters theta.

    Args:
        learning_rate: alpha, as in `adam`.
        b1: as in `adam`.
        b2: as in `adam`.
        eps: as in `adam`.
        eps_root: as in `adam`.
        mu_dtype: as in `adam`.
        weight_decay: a number, a schedule or a tree of these, like `learning_rate`, by which it
            is multiplied as in optax and torch. optax's default 1e-4; torch's is 1e-2.
        mask: which leaves decay: a tree of bools that is a prefix of the parameter tree, or a
            function from the parameters to one. None: all of them.
        nu_dtype: as in `adam`.
        nesterov: as in `adam`.

    Returns:
        An optax gradient transformation. Its state equals that of `optax.adamw`, leaf for leaf.

    Raises:
        ValueError: as `adam`; and in `update` when called without parameters.
        TypeError: as `adam`.
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
    """NAdam, [Dozat (2016)](https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ).

    `adam` with `nesterov=True`: where Adam steps along m^, this looks one step of m ahead,

        update = -alpha m^ / (sqrt(v^ + eps_root) + eps)
        m^ = b1 m / (1 - b1^(t+1)) + (1 - b1) g / (1 - b1^t)

    Arguments, state, dtypes and errors are those of `adam`. Dozat's report also warms b1 up over
    the first few hundred steps (torch's `momentum_decay`); like optax's, this one does not.
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
    """NAdam with decoupled weight decay: `adamw` with `nesterov=True`.

        update = -alpha (m^ / (sqrt(v^ + eps_root) + eps) + weight_decay theta)

    with the m^ of `nadam`. Arguments, state, dtypes and errors are those of `adamw`.
    """
    return adamw(
        learning_rate, b1, b2, eps, eps_root, mu_dtype, weight_decay, mask,
        nu_dtype=nu_dtype, nesterov=True,
    )  # fmt: skip

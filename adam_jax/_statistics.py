"""Describes a step in a few numbers for each leaf, to watch a training run."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adam_jax._checks import check_decay, flatten_up_to
from adam_jax._codec import Stored, codec_of
from adam_jax._master_weights import MasterWeightsState, master_leaf
from adam_jax._moments import (
    Decay,
    abs_sq,
    arithmetic_dtype,
    bias_correction,
    real_dtype,
    sqrt,
)
from adam_jax._rounding import split
from adam_jax._sharding import fetched
from adam_jax._state import leaves_of, states_of, states_with_moments, unboxed
from adam_jax._types import KeyPath, Leaf, RealLeaf, Scalar, is_low, is_none

_ROOTS = ("update_rms", "param_rms", "signal_to_noise", "remainder_use")  # of means of squares


def step_statistics(
    updates: optax.Updates,
    state: Any,
    params: optax.Params,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    infinity_norm: bool = False,
    old_state: Any = None,
) -> dict[str, jax.Array]:
    r"""Returns a few numbers on a step, for each leaf and overall, in a form that any logger takes.

    | name | meaning |
    |---|---|
    | `update_rms` | root mean square of the update, in units of the parameters |
    | `param_rms` | root mean square of the parameters before the step |
    | `update_to_param` | their ratio; 0 where parameters are all 0 |
    | `signal_to_noise` | root mean square of the ratio $\hat m / \sqrt{\hat v}$ |
    | `near_bound` | share of the coordinates whose ratio is more than half of its bound |
    | `nu_at_smallest` | share of nu at the smallest value of its format: code 0 in int8, else 0 |
    | `remainder_use` | how much of the remainder's range `master_weights` uses, from 0 to 1 |

    A name alone is the key of a statistic over all elements of all leaves. For one leaf the key is
    `name/path`, with `/` between the parts of the leaf's path as well.

    The ratio is a signal-to-noise ratio (section 2.1 of
    [Kingma and Ba, 2015](https://arxiv.org/abs/1412.6980)): 1 where gradients agree, and
    $\sqrt{(1 - \beta_1) / (1 + \beta_1)}$, by default 0.23, where they are noise. By Cauchy and
    Schwarz, with $r = \beta_1^2 / \beta_2$,

    $$\frac{|\hat m|}{\sqrt{\hat v}} \le (1 - \beta_1)
    \sqrt{\frac{1 + r + \dots + r^{t-1}}{1 - \beta_2}}
    \cdot \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}$$

    With the defaults the bound is 1 at the first step, where every coordinate attains it, and 7.27
    in the long run. Before a first step, as under `optax.MultiSteps`, the ratio is 0. Moments in
    bfloat16 and int8 are read as a step reads them. `remainder_use` is the root mean square of the
    remainders divided by that of uniformly distributed ones, and at most 1.

    Call it inside the jitted step: it makes one more pass over arrays that the step uses anyway.

    Args:
        updates: the updates that `update` returned. A leaf that is None is left out.
        state: the state that `update` returned, with states of `scale_by_adam`,
            `scale_by_amsgrad` or `scale_by_adamax` in it, at any depth. A masked leaf, which none
            of them has, lacks the statistics that need moments.
        params: the parameters that `update` was given, those before the step.
        b1: the optimizer's $\beta_1$, in [0, 1), for the bias correction.
        b2: the optimizer's $\beta_2$, in [0, 1), likewise.
        infinity_norm: True for AdaMax, whose nu holds $u$. The ratio is then $\hat m / u$, and its
            bound $\beta_2 (1 - \beta_1) / (\beta_2 - \beta_1)$ in the long run.
        old_state: the state before the step. If it is given, updates and parameters are those of
            the float32 weights that `master_weights` trains. Without it they are those of the
            stored parameters. These move by whole ulps or not at all, so the root mean square of
            steps shorter than an ulp comes out too large.

    Returns:
        A dict of float32 scalars, shape ().

    Raises:
        ValueError: for a `b1` or `b2` outside [0, 1), for a state without moments, and for updates
            with another structure than the parameters, naming the path.

    Examples:
        >>> import adam_jax, jax.numpy as jnp
        >>> optimizer = adam_jax.adam(0.1)
        >>> params = {"scale": jnp.array([1.0, -2.0])}
        >>> gradients = {"scale": jnp.array([0.5, 0.25])}
        >>> updates, state = optimizer.update(gradients, optimizer.init(params))
        >>> statistics = adam_jax.step_statistics(updates, state, params)
        >>> print(f"{statistics['update_rms/scale']:.3f}, {statistics['near_bound']:.0%}")
        0.100, 100%
    """
    check_decay("b1", b1)
    check_decay("b2", b2)
    boxed_paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(updates, is_none)]
    updates, state, params, old_state = map(unboxed, (updates, state, params, old_state))
    update_leaves, treedef = jax.tree.flatten(updates, is_leaf=is_none)
    param_leaves = flatten_up_to(treedef, updates, params, "params")
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(updates, is_none)]
    names = map(_name, paths, boxed_paths)
    stored: dict[KeyPath, tuple[Stored, _Ratio]] = {}
    for found in states_with_moments(state):
        ratio = _ratio(jnp.asarray(found.count), Decay.of(b1), Decay.of(b2), infinity_norm)
        stored |= {path: (moments, ratio) for path, moments in _moments(found).items()}
    remainders, old_remainders = _remainders(state), _remainders(old_state)
    of_masters = bool(states_of(MasterWeightsState, old_state))

    sizes: dict[str, int] = {}
    means: dict[str, dict[str, jax.Array]] = {}  # of each leaf
    for leaf, path, update, param in zip(names, paths, update_leaves, param_leaves, strict=True):
        if update is not None:
            moments, ratio = stored.get(path, (None, None))
            leaf_state = _LeafState(moments, ratio, remainders.get(path), old_remainders.get(path))
            leaf_state = fetched(leaf_state)
            sizes[leaf] = param.size
            means[leaf] = _leaf_means(update, param, leaf_state, infinity_norm, of_masters)

    overall: dict[str, jax.Array] = {}
    for name in dict.fromkeys(name for of_leaf in means.values() for name in of_leaf):
        having = [leaf for leaf in means if name in means[leaf]]
        total = max(sum(sizes[leaf] for leaf in having), 1)
        weighted = [sizes[leaf] / total * means[leaf][name] for leaf in having]
        overall[name] = functools.reduce(jnp.add, weighted)
    statistics = _finished(overall)
    for leaf, of_leaf in means.items():
        statistics |= {f"{name}/{leaf}": x for name, x in _finished(of_leaf).items() if leaf}
    return statistics


class _Ratio(NamedTuple):
    """Turns m / sqrt(v), or AdaMax's m / u, into the ratio, and bounds it."""

    correction: RealLeaf
    bound: RealLeaf


class _LeafState(NamedTuple):
    """What the state has for a leaf; None for whatever it lacks."""

    moments: Stored | None
    ratio: _Ratio | None
    remainder: Leaf | None
    old_remainder: Leaf | None


@functools.partial(jax.jit, static_argnums=3)
def _ratio(count: jax.Array, b1: Decay, b2: Decay, infinity_norm: bool) -> _Ratio:
    t = jnp.maximum(count, 1).astype(float)  # before the first step the moments are 0 anyway
    b2_or_tiny = jnp.maximum(b2.b, jnp.finfo(t.dtype).tiny)
    correction = 1 / bias_correction(b1, t)
    if infinity_norm:
        largest = b1.one_minus_b * _geometric_sum(b1.b / b2_or_tiny, t)
    else:
        correction = jnp.sqrt(bias_correction(b2, t)) * correction
        weights = _geometric_sum(jnp.square(b1.b) / b2_or_tiny, t)
        largest = b1.one_minus_b * jnp.sqrt(weights / b2.one_minus_b)
    return _Ratio(correction, largest * correction)


def _geometric_sum(r: RealLeaf, t: RealLeaf) -> RealLeaf:
    """Returns 1 + r + ... + r^(t-1)."""
    log_r = jnp.log(jnp.minimum(r, 1e30))  # beyond that the sum is infinite from t = 2 on
    return jnp.where(r == 1, t, jnp.expm1(t * log_r) / jnp.where(r == 1, 1, jnp.expm1(log_r)))


def _name(path: KeyPath, boxed_path: KeyPath) -> str:
    """Returns a leaf's path as text, without the key of a Flax box around the leaf."""
    in_box = boxed_path[-1:] == (jax.tree_util.GetAttrKey("value"),)
    return jax.tree_util.keystr(path if in_box else boxed_path, simple=True, separator="/")


def _leaves(tree: Any) -> dict[KeyPath, Any]:
    return dict(jax.tree_util.tree_leaves_with_path(tree))


def _moments(state: Any) -> dict[KeyPath, Stored]:
    """Returns each leaf's mu and nu, by its path. Masked leaves have none."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(state.mu)]
    leaves = leaves_of(state, state.mu, is_leaf=None)
    return dict(zip(paths, leaves, strict=True))


def _remainders(state: Any) -> dict[KeyPath, Any]:
    found = states_of(MasterWeightsState, state)
    return {path: leaf for state in found for path, leaf in _leaves(state.remainder).items()}


@functools.partial(jax.jit, static_argnums=(3, 4))
def _leaf_means(
    update: Leaf, param: Leaf, leaf_state: _LeafState, infinity_norm: bool, of_masters: bool
) -> dict[str, jax.Array]:
    """Returns the means over one leaf that make up the statistics, in float32."""
    terms: dict[str, jax.Array] = {}
    if is_low(param) and (of_masters or leaf_state.remainder is not None):
        with jax.numpy_dtype_promotion("standard"):
            new_param = optax.apply_updates(param, update)
        master = master_leaf(new_param, leaf_state.remainder)
        if leaf_state.remainder is not None:
            # As 16 bits of an ulp, whatever its format. Uniform ones are from -1/2 to 1/2 ulp.
            _, remainder = split(master, param.dtype, width=16)
            terms["remainder_use"] = 12 * jnp.square(remainder.astype(jnp.float32) * 2.0**-16)
        if of_masters:
            param = master_leaf(param, leaf_state.old_remainder)
            update = master - param
    wide = arithmetic_dtype(update.dtype, param.dtype)
    terms["update_rms"] = abs_sq(update.astype(wide))
    terms["param_rms"] = abs_sq(param.astype(wide))
    if leaf_state.moments is not None and leaf_state.ratio is not None:
        real = real_dtype(wide)
        codec = codec_of(leaf_state.moments)
        rows = codec.opened(leaf_state.moments.rows, real)
        m, v, *_ = codec.read(leaf_state.moments, rows, real)
        correction, bound = (
            leaf_state.ratio.correction.astype(real),
            leaf_state.ratio.bound.astype(real),
        )
        size = jnp.where(v == 0, 1, v) if infinity_norm else sqrt(v)
        ratio = jnp.abs(m) * correction / size
        terms["signal_to_noise"] = jnp.square(ratio)
        terms["near_bound"] = ratio > bound / 2
        terms["nu_at_smallest"] = codec.nu_at_smallest(leaf_state.moments)
    return {
        name: jnp.sum(x, dtype=jnp.float32) / float(max(x.size, 1)) for name, x in terms.items()
    }


@jax.jit
def _finished(means: dict[str, jax.Array]) -> dict[str, jax.Array]:
    statistics = {name: jnp.sqrt(x) if name in _ROOTS else x for name, x in means.items()}
    if means:
        update, param = statistics["update_rms"], statistics["param_rms"]
        statistics["update_to_param"] = jnp.where(param == 0, 0, update / param)
    if "remainder_use" in means:  # up to sqrt(3) for remainders that are not uniform
        statistics["remainder_use"] = jnp.minimum(statistics["remainder_use"], 1)
    return statistics

"""Trains bfloat16 and float16 parameters as if they had more bits."""

# Annotations stay text: cloudpickle then has no types to pickle along with a function.
from __future__ import annotations

import functools
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import tree_leaves_with_path
from jax.typing import DTypeLike

from adam_jax._checks import (
    another_remainder,
    check_choice,
    check_leaves,
    check_param,
    check_remainder,
    check_state,
    flatten_up_to,
    leaf_path,
)
from adam_jax._landing import CheckLandingState, moved
from adam_jax._moments import arithmetic_dtype
from adam_jax._rounding import Draw, draws, join, split
from adam_jax._sharding import fetched, placed, resharded
from adam_jax._state import (
    WITH_MOMENTS,
    gathered,
    leaves_beside,
    map_states,
    only_state,
    states_of,
    unaliased,
    unboxed,
    with_extra_args,
)
from adam_jax._types import Leaf, RealLeaf, Words, is_low, is_masked, is_none

_NOTHING = "none"
_ROUNDED = (_NOTHING, "int8")  # stochastically, at each step
_FORMATS = {"int8": np.int8, "int16": np.int16, "float32": np.float32}
_NO_LOW_PRECISION = (
    "no parameter is bfloat16 or float16, so there is nothing for master_weights to do. To train "
    "float32 weights in fewer bytes, cast them and keep the lost bits in remainders: "
    "params = optax.tree.cast(weights, jax.numpy.bfloat16); state = optimizer.init(params); "
    "params, state = adam_jax.load_master_params(weights, params, state)"
)


class NoLowPrecisionWarning(UserWarning):
    """`master_weights` was given no bfloat16 or float16 parameter, and changes nothing."""


class MasterWeightsState(NamedTuple):
    """State of `master_weights`.

    Attributes:
        count: int32, shape (): the number of steps made, which seeds the random bits of each step.
        remainder: shaped like the parameters, int8, int16 or float32; the empty tuple for
            `"none"`. A parameter in float32 or wider needs none, and has one of shape ().
        inner_state: the state of the inner optimizer, which sees float32 weights.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    remainder: optax.Params
    inner_state: Any


def master_weights(
    inner: optax.GradientTransformation, remainder: str
) -> optax.GradientTransformationExtraArgs:
    r"""Trains bfloat16 and float16 parameters in float32, of which they store the upper bits.

    A step smaller than an ulp of the parameter (8 bits of precision in bfloat16, 11 in float16)
    would be rounded away. Here a weight $w$ consists of the parameter $p$ and a remainder $r$, and
    each step is made in float32:

    $$
    \begin{aligned}
    w &= p + r\, \mathrm{ulp}(p) \\
    w &\leftarrow w + \text{inner}(\text{float32}(g), w) \\
    p &\leftarrow w \text{ rounded}, \quad r \leftarrow (w - p) / \mathrm{ulp}(p) \text{ rounded}
    \end{aligned}
    $$

    | `remainder` | bytes per parameter, with $p$ | weights | rounding |
    |---|---:|---|---|
    | `"none"` | 2 | $p$ alone | stochastic, unbiased |
    | `"int8"` | 3 | 8 more bits: $2^{-8}$ ulp | stochastic, unbiased |
    | `"int16"` | 4 | 16 more bits; with bfloat16 that is exactly float32 | none (see below) |
    | `"float32"` | 6 | exactly float32, for float16 too | none |

    The update is the float32 number $p_\text{new} - p$. `optax.apply_updates` adds in float32 and
    rounds once, so the parameter lands on $p_\text{new}$ exactly. Hence **this must be the
    outermost wrapper of a chain**: whatever scales or clips its updates makes parameter and
    remainder disagree, which `check_landing` detects. Updates are float32 even if gradients are
    bfloat16. `inner` sees float32 gradients and weights, so clipping, decoupled decay and
    accumulation of gradients also run in float32.

    With bfloat16 and `"int16"`, or with `"float32"`, parameter and remainder together are
    bit-identical to the float32 weight that the step computed. Whole runs are bit-identical to
    float32 runs as long as both round alike: in a jitted program XLA may fuse the last product of
    an update with this sum, in one program and not in another, and then leaves out a rounding of
    less than an ulp of the update. With float16, `"int16"` keeps $2^{-16}$ ulp: exact for weights
    from $2^{-17}$ to 65504, and rounded stochastically to multiples of $2^{-40}$ below. The random
    bits are a hash of leaf, coordinates and step.

    A finite weight beyond the largest finite parameter (3.39e38 for bfloat16, 65504 for float16)
    becomes that parameter, except with `"float32"`, whose remainder reaches further. Infinity and
    NaN are passed on. Landing is exact with two exceptions. On processors that flush subnormal
    numbers, as JAX lets CPUs and TPUs do, it may be off by less than $2^{-126}$; elsewhere a
    bfloat16 weight below $2^{-134}$ counts as 0. And a step that cancels all but $2^{-16}$ of a
    weight may leave the parameter an ulp of the step away from $p_\text{new}$; parameter and
    remainder still agree.

    Leaves in float32, float64 or complex dtypes pass through unchanged. A `None` gradient gives
    a `None` update and leaves the remainder untouched.

    [Zamirai et al. (2020)](https://arxiv.org/abs/2010.06192) compare stochastic rounding with
    compensated sums for bfloat16 weights. Kahan's compensated sum, as in `optimi`, keeps the same
    information as a remainder in bfloat16. NVIDIA's apex and TransformerEngine split float32 into
    bfloat16 and 16 bits. Remainders of 8 bits, there rounded to nearest, are from FlashOptim
    ([2026](https://arxiv.org/abs/2602.23349)).

    Args:
        inner: any optax gradient transformation, or a whole chain of them.
        remainder: `"none"`, `"int8"`, `"int16"` or `"float32"`.

    Returns:
        An optax gradient transformation with a `MasterWeightsState`. `master_params` reads the
        float32 weights out, `load_master_params` puts them in.

    Raises:
        ValueError: for another `remainder`; in `init`, for `optax.lookahead` inside, and for
            `optax.contrib.mechanize` with `"none"` or `"int8"`; in `update`, without parameters, or
            with gradients that do not fit them.
        TypeError: in `init`, for a parameter of integer dtype, naming its path.

    Warns:
        NoLowPrecisionWarning: in `init`, if no parameter is bfloat16 or float16.

    Examples:
        >>> import adam_jax, jax, jax.numpy as jnp, optax
        >>> optimizer = adam_jax.master_weights(adam_jax.adamw(1e-3), "int16")
        >>> params = jnp.array([1.0, -2.0], jnp.bfloat16)
        >>> state = optimizer.init(params)
        >>> gradients = jax.grad(lambda x: jnp.sum(x**2))(params)
        >>> updates, state = optimizer.update(gradients, state, params)
        >>> params = optax.apply_updates(params, updates)
        >>> params
        Array([1, -2], dtype=bfloat16)
        >>> adam_jax.master_params(params, state)
        Array([ 0.9989999, -1.9989998], dtype=float32)
    """
    check_choice("remainder", remainder, [_NOTHING, *_FORMATS])
    inner = with_extra_args(inner)

    def init(params: optax.Params) -> MasterWeightsState:
        check_leaves("parameter", params)
        leaves = jax.tree.leaves(params)
        if leaves and not any(map(is_low, leaves)):
            warnings.warn(_NO_LOW_PRECISION, NoLowPrecisionWarning, stacklevel=2)
        inner_state = inner.init(jax.tree.map(_master_like, params))
        _check_inner(inner_state, remainder)
        return MasterWeightsState(
            count=jnp.zeros([], jnp.int32),
            remainder=no_remainders(params, remainder),
            inner_state=inner_state,
        )

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, MasterWeightsState]:
        if params is None:
            raise ValueError(
                "master_weights needs the parameters: call update(gradients, state, params)."
            )
        check_state(MasterWeightsState, state)
        gradients, tree = jax.tree.flatten(updates, is_leaf=is_none)
        old_params = flatten_up_to(tree, updates, params, "params")
        like = unboxed(tree.unflatten(old_params), keep=is_low)
        remainder_tree = jax.tree.structure(like, is_leaf=is_none)
        stored = remainder != _NOTHING
        if bool(jax.tree.leaves(state.remainder)) != (stored and bool(jax.tree.leaves(params))):
            raise another_remainder(remainder, state.remainder)
        remainders = (
            flatten_up_to(remainder_tree, like, state.remainder, "state.remainder")
            if stored
            else [None] * len(gradients)
        )
        for i, (g, p, r) in enumerate(zip(gradients, old_params, remainders, strict=True)):
            path = functools.partial(leaf_path, updates, i)
            if is_low(p) and g is not None:  # casting would hide a wrong dtype
                check_param(path, g, p)
            if r is not None:
                check_remainder(path, p, r, remainder, _FORMATS[remainder], low=is_low(p))
        masters = [master_leaf(p, r) for p, r in zip(old_params, remainders, strict=True)]
        steps, inner_state = inner.update(
            tree.unflatten([_widened(g, p) for g, p in zip(gradients, old_params, strict=True)]),
            state.inner_state,
            tree.unflatten(masters),
            **extra_args,
        )
        steps = flatten_up_to(tree, updates, steps, "the inner optimizer's updates")
        count = jnp.asarray(optax.safe_increment(state.count))
        drawn = draws(len(steps), ~count)  # moments draw with the count: these bits differ
        positions = extra_args.get("positions", ())
        outcome = [
            (u, r) if u is None or not is_low(p) else _step_leaf(u, p, w, r, draw.at(positions, p))
            for u, p, w, r, draw in zip(steps, old_params, masters, remainders, drawn, strict=True)
        ]
        return tree.unflatten([u for u, _ in outcome]), MasterWeightsState(
            count=count,
            remainder=remainder_tree.unflatten([r for _, r in outcome]) if stored else (),
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _check_inner(inner_state: Any, remainder: str) -> None:
    """Raises ValueError for an optimizer that cannot work inside `master_weights`."""
    if states_of(optax.LookaheadState, inner_state):
        raise ValueError(
            "optax.lookahead cannot be inside master_weights: its parameters are pairs of fast and "
            "slow ones, but its gradients belong to the fast ones alone. For an average of the "
            "weights use adam_jax.average_params."
        )
    if remainder in _ROUNDED and states_of(optax.contrib.MechanicState, inner_state):
        raise ValueError(
            "optax.contrib.mechanize divides the distance that weights have moved by a small "
            f"number, which magnifies the rounding errors of remainder={remainder!r}. Use 'int16' "
            "or 'float32'."
        )


def master_params(params: optax.Params, state: Any) -> optax.Params:
    """Returns the float32 weights that `master_weights` trains.

    `params` store the upper bits of these weights, and the remainders in the state the others.

    Args:
        params: the current parameters. Leaves that are neither bfloat16 nor float16, or that
            `optax.masked` or `optax.multi_transform` keeps from `master_weights`, are returned
            unchanged.
        state: an optimizer state with one `master_weights` state in it, at any depth.

    Returns:
        A tree shaped like `params`, with float32 for bfloat16 and float16. It shares no array with
        `params`, so donating one deletes nothing of the other.

    Raises:
        ValueError: if there is no such state, or more than one.

    Examples:
        >>> import adam_jax, jax.numpy as jnp
        >>> params = jnp.array([0.5], jnp.bfloat16)
        >>> state = adam_jax.master_weights(adam_jax.adam(1e-3), "int8").init(params)
        >>> adam_jax.master_params(params, state)
        Array([0.5], dtype=float32)
    """
    only_state(MasterWeightsState, "master_weights", state)  # there must be one
    return unaliased(jax.tree.map(placed, weights_of(params, state), params), params)


def weights_of(params: optax.Params, state: Any) -> optax.Params:
    """Returns the weights that an optimizer trains, in float32 where `master_weights` does."""
    leaves, tree = jax.tree.flatten(params)
    for found in states_of(MasterWeightsState, state):
        leaves = [
            p if is_masked(r) else master_leaf(p, r)
            for p, r in zip(leaves, _remainder_leaves(found, params), strict=True)
        ]
    return tree.unflatten(leaves)


def load_master_params(
    master: optax.Params, params: optax.Params, state: Any
) -> tuple[optax.Params, Any]:
    r"""Returns parameters and a state that represent the given float32 weights.

    A float32 checkpoint that is only cast to bfloat16 loses 16 of its bits. This function puts them
    into the remainder. `master_params` of the result is `master`: exactly for `"float32"`; within
    the limits that `master_weights` states for `"int16"`; to half of $2^{-8}$ ulp for `"int8"`.
    With `"none"` there is no place to keep them, and the parameters are rounded to nearest.

    The inner optimizer's state stays as it is. Some optimizers of `optax.contrib` store weights,
    their first ones or others: `schedule_free`, `mechanize`, `prodigy`, `dog`, `cocob`. Initialize
    these again: `state = state._replace(inner_state=inner.init(master))`.

    Args:
        master: the weights, in float32.
        params: a tree with the dtypes of the parameters, such as the one passed to `init`.
        state: an optimizer state with one `master_weights` state in it, at any depth.

    Returns:
        The parameters, in the dtypes of `params`, and the state.

    Raises:
        ValueError: if there is no such state, or more than one, and for a weight whose shape is not
            its parameter's.
        TypeError: for weights of integer dtype, and complex weights of real parameters.

    Examples:
        >>> import adam_jax, jax, jax.numpy as jnp
        >>> optimizer = adam_jax.master_weights(adam_jax.adamw(1e-3), "int16")
        >>> master = jnp.array([0.1, -0.7])
        >>> params = master.astype(jnp.bfloat16)
        >>> params, state = adam_jax.load_master_params(master, params, optimizer.init(params))
        >>> adam_jax.master_params(params, state)
        Array([ 0.1, -0.7], dtype=float32)
    """
    old = only_state(MasterWeightsState, "master_weights", state)
    weights = leaves_beside(params, unboxed(master), "master")
    likes, tree = jax.tree.flatten(params)
    loaded, remainders = [], []
    for i, (w, p, r) in enumerate(zip(weights, likes, _remainder_leaves(old, params), strict=True)):
        check_param(lambda i=i: tree_leaves_with_path(params)[i][0], w, p, what="weight")
        if is_low(p) and not is_masked(r):
            w = _quiet(jnp.asarray(placed(w, p), jnp.float32))
            p, new = _split_leaf(w, p.dtype, None if r is None else r.dtype)
            r = None if r is None else placed(new, r)
        else:
            p = placed(jnp.asarray(w, p.dtype), p)
        loaded.append(p)
        remainders.append(r)
    if jax.tree.leaves(old.remainder):
        remainder_tree = jax.tree.structure(old.remainder)
        old = old._replace(remainder=remainder_tree.unflatten(jax.tree.leaves(remainders)))
    loaded_state = map_states(lambda _: old, MasterWeightsState, state)
    loaded_state = map_states(moved, CheckLandingState, loaded_state)
    return unaliased((tree.unflatten(loaded), loaded_state), master, params, state)


def remainders_of_group(params: optax.Params, state: MasterWeightsState, remainder: str) -> Any:
    """Returns zero remainders for the parameters, or the group of them, that a state covers.

    They lie on the devices of the old remainders, or of the moments if there are none, and in the
    same kind of boxes.
    """
    check_choice("remainder", remainder, [_NOTHING, *_FORMATS])
    if remainder == _NOTHING:
        return ()
    dtype = _FORMATS[remainder]
    box = jax.tree.structure(state.count)

    def zeros(param: Any, like: Any) -> Any:
        if is_low(param) or is_masked(like):
            return jax.tree.map(lambda x: placed(jnp.zeros_like(param, dtype), x), like)
        return box.unflatten([jnp.zeros((), dtype)])

    leaves, tree = jax.tree.flatten(unboxed(params))
    of_leaves = tree.unflatten(map(zeros, leaves, _likes(state, params)))
    return gathered(of_leaves, [x for _, x in _trees(state, params)])


def no_remainders(params: optax.Params, remainder: str) -> Any:
    """Returns remainders of zero, for parameters that equal their float32 weights."""
    check_choice("remainder", remainder, [_NOTHING, *_FORMATS])
    if remainder == _NOTHING:
        return ()
    dtype = _FORMATS[remainder]
    zeros = [
        jnp.zeros_like(p, dtype) if is_low(p) else jnp.zeros((), dtype)
        for p in jax.tree.leaves(params)
    ]
    return jax.tree.structure(unboxed(params, keep=is_low)).unflatten(zeros)


def _remainder_leaves(state: MasterWeightsState, params: optax.Params) -> list[Any]:
    """Returns the remainder of each parameter, or None where none is stored.

    A parameter in a group without `master_weights` gets an `optax.MaskedNode`.
    """
    stored = bool(jax.tree.leaves(state.remainder))
    return [unboxed(x) if stored or is_masked(x) else None for x in _likes(state, params)]


def _likes(state: MasterWeightsState, params: optax.Params) -> list[Any]:
    """Returns for each parameter, in its box, the remainder or else a moment that the state has.

    It is an `optax.MaskedNode` where the state has neither, and the parameter itself in a state
    that has neither for any leaf.
    """
    columns = [leaves_beside(params, x, name) for name, x in _trees(state, params)]
    return [
        next((x for x in column if not is_masked(x)), optax.MaskedNode())
        for column in zip(*columns, strict=True)
    ]


def _trees(state: MasterWeightsState, params: optax.Params) -> list[tuple[str, Any]]:
    """Returns the state's trees that are shaped like the parameters, or else the parameters."""
    if jax.tree.leaves(state.remainder):
        return [("state.remainder", state.remainder)]
    found = states_of(WITH_MOMENTS, state.inner_state)
    return [("state.mu", x.mu) for x in found] or [("params", params)]


def master_leaf(param: Any, remainder: Leaf | None = None) -> Any:
    """Returns a 16-bit parameter's float32 weight, and any other parameter unchanged."""
    return _joined(param, fetched(remainder)) if is_low(param) else param


def _master_like(param: Any) -> Any:
    """Returns the float32 weight of a parameter, or its type where only the type is known."""
    if is_low(param) and isinstance(param, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(param.shape, np.float32, sharding=param.sharding)
    return master_leaf(param)


def _widened(gradient: Any, param: Any) -> Any:
    if gradient is None or not is_low(param):
        return gradient
    return jnp.asarray(gradient, arithmetic_dtype(jnp.result_type(gradient)))


def _quiet(x: RealLeaf) -> RealLeaf:
    """Returns the same numbers, with NaN in the bit pattern that arithmetic gives it."""
    return jnp.where(jnp.isnan(x), jnp.nan, x)


# Bit operations have no derivatives. Parameters get those of the float32 weights
# (straight-through), and remainders are constants.
@jax.custom_jvp
@jax.jit
def _joined(param: RealLeaf, remainder: Leaf | None) -> RealLeaf:
    if remainder is None:
        return join(param)
    param = resharded(param, remainder)
    if remainder.dtype == np.float32:
        return join(param) + remainder
    return join(param, remainder, _width(remainder.dtype))


@_joined.defjvp
def _(primals: Any, tangents: Any) -> tuple[RealLeaf, RealLeaf]:
    master = _joined(*primals)
    return master, resharded(tangents[0].astype(np.float32), master)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
@functools.partial(jax.jit, static_argnums=(1, 2))
def _split_leaf(
    master: RealLeaf,
    param_dtype: DTypeLike,
    remainder_dtype: DTypeLike | None,
    bits: Words | None = None,
) -> tuple[RealLeaf, Leaf | None]:
    if remainder_dtype is None:
        return split(master, param_dtype, 0, bits)[0], None
    param, remainder = split(master, param_dtype, _width(remainder_dtype), bits)
    if remainder_dtype == np.float32:
        # The difference of two close numbers is exact; infinity minus infinity would be NaN.
        remainder = jnp.where(jnp.isfinite(master), master - join(param), 0)
    return param, remainder


@_split_leaf.defjvp
def _(param_dtype: Any, remainder_dtype: Any, primals: Any, tangents: Any) -> Any:
    param, remainder = _split_leaf(primals[0], param_dtype, remainder_dtype, *primals[1:])
    return (param, remainder), (tangents[0].astype(param_dtype), _constant(remainder))


def _width(remainder_dtype: DTypeLike) -> int:
    return 8 if remainder_dtype == np.int8 else 16


@jax.custom_jvp
@jax.jit
def _step_leaf(
    update: RealLeaf,
    param: RealLeaf,
    master: RealLeaf,
    remainder: Leaf | None,
    draw: Draw,
) -> tuple[RealLeaf, Leaf | None]:
    """Returns the update that takes one leaf to its new weight, and the new remainder."""
    master = master + update.astype(np.float32)
    new_param, remainder = _split_leaf(
        master,
        param.dtype,
        None if remainder is None else remainder.dtype,
        draw.independent(master),
    )
    # The parameter has to land on new when this difference is added to it. Let |old| be in
    # [2^e, 2^(e+1)). If new's ulp is 2^(e-23) or more, the difference is exact, or off by much
    # less than that ulp. Otherwise the step cancelled all but 2^-16 of the weight. Then the
    # difference may be rounded, and the parameter may land 2^(e-24) away from new. The remainder
    # refers to new, but it is a part of such a small ulp that the weight is still right within
    # 2^(e-23).
    gathered = resharded(new_param, param)  # 16 bits, and not the 32 of their difference
    old, new = join(param), join(gathered)
    in_float32 = None
    if remainder is not None and remainder.dtype == np.float32 and gathered is new_param:
        in_float32 = remainder
    if in_float32 is not None and param.dtype == jnp.bfloat16:
        # The same number exactly. Computing it from the remainder lets XLA for TPU make both in
        # one pass.
        new = master - in_float32
    difference = -(old - new)  # new - old, but -0 where they are equal, which keeps a -0
    # The difference is not finite where new is not, and where two finite numbers are further apart
    # than the largest float32. No finite update leads from one to the other then.
    finite = jnp.isfinite(difference)
    if in_float32 is not None:
        # This makes XLA for TPU recompute the step for parameter and remainder, in a joint pass,
        # instead of storing it for both.
        finite &= jnp.isfinite(update)
    return jnp.where(finite, difference, new), remainder


@_step_leaf.defjvp
def _(primals: Any, tangents: Any) -> Any:
    difference, remainder = _step_leaf(*primals)
    update, param, master = (resharded(x.astype(np.float32), difference) for x in tangents[:3])
    return (difference, remainder), (master + update - param, _constant(remainder))


def _constant(remainder: Leaf | None) -> Any:
    """Returns the tangent of a constant."""
    if remainder is None or remainder.dtype == np.float32:
        return jax.tree.map(jnp.zeros_like, remainder)
    return np.zeros(remainder.shape, jax.dtypes.float0)

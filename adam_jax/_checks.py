"""Finds, while tracing, what callers can get wrong: hyperparameters, and trees that do not fit.

Only concrete numbers are checked. Inside `optax.inject_hyperparams`, `jit` or `vmap` the
hyperparameters are tracers, whose values are not known.
"""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.typing import DTypeLike

from adam_jax._codec import Stored
from adam_jax._storage import Int8Moment, stores
from adam_jax._types import KeyPath, Scalar, is_function, is_none


def check_decay(name: str, b: Scalar) -> None:
    """Raises ValueError unless 0 <= b < 1 (a bfloat16 or float16 b may have rounded to 1)."""
    _check_scalar(name, b)
    # `optax.inject_hyperparams` rounds to the parameters' dtype: see `_moments.Decay`.
    dtype = b.dtype if isinstance(b, jax.Array) else np.dtype(np.float32)
    rounded = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    # As a number: under jit, comparing with an array gives a tracer, even for a concrete array.
    if _is_concrete(b) and not (0 <= float(b) < 1 or (rounded and float(b) == 1)):
        raise ValueError(f"{name} must be in [0, 1), got {b}.")


def check_not_negative(name: str, value: Scalar) -> None:
    """Raises ValueError unless 0 <= value < infinity, in float32."""
    _check_scalar(name, value)
    if _is_concrete(value) and not 0 <= float(value) <= float(np.finfo(np.float32).max):
        raise ValueError(f"{name} must be non-negative and finite in float32, got {value}.")


def check_rate(name: str, rate: Any, types: Collection[type[Any]] = ()) -> None:
    """Raises an error unless every leaf is a schedule, a number, or an array or tracer of one.

    `types` are those of the parameters' containers, where parameters are known.
    """
    is_schedule = functools.partial(is_function, types)
    for path, leaf in jax.tree_util.tree_leaves_with_path(rate, is_leaf=is_schedule):
        if not is_schedule(leaf):
            path = name + jax.tree_util.keystr(path)
            _check_number(path, leaf, "a number or a schedule")
            _check_shape(path, leaf)


def check_scheduled(name: str, rates: Any) -> None:
    """Raises ValueError unless the results of schedules are scalars."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(rates):
        _check_shape(f"the schedule {name}{jax.tree_util.keystr(path)}", leaf)


def _check_number(name: str, value: Any, expected: str) -> None:
    number = isinstance(value, int | float | np.number | np.ndarray | jax.Array)
    if isinstance(value, bool) or not number:
        raise TypeError(f"{name} must be {expected}, got {value!r}.")


def _check_scalar(name: str, value: Scalar) -> None:
    _check_number(name, value, "a number")
    _check_shape(name, value)


def _check_shape(name: str, value: Any) -> None:
    if np.shape(value) != ():
        raise ValueError(
            f"{name} must be a scalar, got shape {np.shape(value)}. To run several settings at "
            "once, use jax.vmap."
        )


def _is_concrete(value: Scalar) -> bool:
    return not isinstance(value, Tracer)


def check_mask(path: Callable[[int], KeyPath], mask: Sequence[Any]) -> None:
    """Raises ValueError unless each leaf's mask is one bool; `path` is that of the i-th leaf."""
    for i, value in enumerate(mask):
        if np.shape(value) != ():
            raise ValueError(
                f"mask has shape {np.shape(value)} at {keystr(path(i))}. It selects whole leaves "
                "to decay: pass one bool for each."
            )


def check_leaves(what: str, tree: Any) -> None:
    """Raises TypeError unless every leaf has a real or complex floating dtype."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        _check_inexact(what, lambda path=path: path, leaf)


def _check_inexact(what: str, path: Callable[[], KeyPath], leaf: Any) -> None:
    is_array = hasattr(leaf, "dtype") or isinstance(leaf, int | float | complex)
    dtype = _dtype(leaf) if is_array else type(leaf).__name__
    # float8 is a floating dtype, but none that JAX promotes to float32.
    if not (is_array and jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits >= 16):
        raise TypeError(
            f"{what} {keystr(path())} has dtype {dtype}; only real and complex floating dtypes of "
            "16 bits or more can be optimized. Leave the leaf out with optax.masked, or pass None "
            "for it."
            if is_array
            else f"{what} {keystr(path())} is a {dtype} and no array. Pass a tree of arrays, with "
            "None for everything else: equinox.filter(model, equinox.is_inexact_array) makes one."
        )


def check_leaf(
    path: Callable[[], KeyPath],
    gradient: Any,
    stored: Stored,
    names: Sequence[str],
    mu_format: str | None,
    nu_format: str | None,
) -> None:
    """Checks that a gradient leaf and the stored moments belong to one parameter.

    `names` are those of the moments, and the formats are those in which the optimizer stores them.
    """
    _check_inexact("gradient", path, gradient)
    moments = dict(zip(names, (stored.mu, stored.nu, *stored.others), strict=True))
    for name, moment in moments.items():
        if not hasattr(moment, "dtype"):
            raise ValueError(
                f"gradient {keystr(path())} is an array, but state.{name} there is "
                f"{type(moment).__name__}. The optimizer was initialised with other parameters: "
                "call init again, or pass gradients with the structure of those parameters."
            )
        if np.shape(gradient) != np.shape(moment):
            raise ValueError(
                f"gradient {keystr(path())} has shape {np.shape(gradient)}, but state.{name} "
                f"there has shape {np.shape(moment)}. A gradient has its parameter's shape."
            )
        format = mu_format if name == "mu" else nu_format
        if not stores(moment, format, code=np.int8 if name == "mu" else np.uint8):
            raise _another_format(name, moment.dtype, format, jax.tree_util.keystr(path()))
    if jnp.iscomplexobj(gradient) != jnp.iscomplexobj(stored.mu):
        raise TypeError(
            f"gradient {keystr(path())} has dtype {_dtype(gradient)}, but state.mu there "
            f"has dtype {_dtype(stored.mu)}. A gradient is complex where its parameter is, and "
            "only there."
        )
    nu_is_coded = stored.nu.dtype == np.uint8
    coded = {"scales": nu_is_coded, "units": nu_is_coded or stored.mu.dtype == np.int8}
    for (name, is_coded), rows in zip(coded.items(), stored.rows, strict=True):
        shape = (*np.shape(gradient)[:-1], 1) if is_coded else ()
        if rows is not None and (np.shape(rows) != shape or rows.dtype != np.float32):
            raise ValueError(
                f"state.nu.{name}{jax.tree_util.keystr(path())} has shape {np.shape(rows)} and "
                f"dtype {_dtype(rows)}, but it must have one float32 for each row of the gradient, "
                f"shape {shape}. Pass the state of init, or of its checkpoint."
            )


def check_moments(path: Callable[[], KeyPath], stored: Stored, names: Sequence[str]) -> None:
    """Raises TypeError unless each moment of a leaf has the dtype of a storage format."""
    for name, moment in zip(names, (stored.mu, stored.nu, *stored.others), strict=True):
        code = np.int8 if name == "mu" else np.uint8
        if not jnp.issubdtype(moment.dtype, jnp.inexact) and moment.dtype != code:
            raise TypeError(
                f"state.{name}{jax.tree_util.keystr(path())} has dtype {moment.dtype}, but no "
                "storage format has that dtype. Pass the state of init, or of its checkpoint."
            )


def check_struct(nu: Any, *, mu_int8: bool, nu_int8: bool) -> None:
    """Raises ValueError unless nu is an `Int8Moment` where a moment may be in int8."""
    is_struct = isinstance(nu, Int8Moment)
    if is_struct == (mu_int8 or nu_int8):
        return
    dtypes = {x.dtype for x in jax.tree.leaves(nu[0] if is_struct else nu) if hasattr(x, "dtype")}
    if is_struct:
        name = "nu" if np.dtype(np.uint8) in dtypes else "mu"
        raise _another_format(name, np.dtype(np.uint8), None, "")
    found = min(dtypes, default=np.dtype(np.float32), key=str)
    raise _another_format("nu" if nu_int8 else "mu", found, "int8", "")


def _another_format(name: str, dtype: Any, requested: str | None, path: str) -> ValueError:
    requested = requested or "float32"
    argument = "nu_dtype" if name == "nu_max" else f"{name}_dtype"
    found = "int8" if dtype == np.uint8 else str(dtype)
    return ValueError(
        f"state.{name}{path} is stored in {found}, but this optimizer stores it in {requested}. "
        f"Make the optimizer with {argument}={found!r}, or convert the state with "
        "adam_jax.convert_state, which takes a tree of formats if groups of parameters have "
        "different ones."
    )


def check_param(
    path: Callable[[], KeyPath], leaf: Any, param: Any, *, what: str = "gradient"
) -> None:
    """Checks that a gradient leaf, or another leaf called `what`, belongs to a parameter."""
    _check_inexact(what, path, leaf)
    if np.shape(leaf) != np.shape(param):
        raise ValueError(
            f"{what} {keystr(path())} has shape {np.shape(leaf)}, but the parameter there "
            f"has shape {np.shape(param)}. A {what} has its parameter's shape."
        )
    if jnp.iscomplexobj(leaf) != jnp.iscomplexobj(param):
        raise TypeError(
            f"{what} {keystr(path())} has dtype {_dtype(leaf)}, but the parameter there has "
            f"dtype {_dtype(param)}. A {what} is complex where its parameter is, and only there."
        )


def check_remainder(
    path: Callable[[], KeyPath],
    param: Any,
    remainder: Any,
    requested: str,
    dtype: DTypeLike,
    *,
    low: bool,
) -> None:
    """Checks that a remainder belongs to a parameter, which is `low` if it has 16 bits."""
    if low and np.shape(remainder) != np.shape(param):
        raise ValueError(
            f"state.remainder{keystr(path())} has shape {np.shape(remainder)}, but the parameter "
            f"has shape {np.shape(param)}. Pass the state that belongs to these parameters."
        )
    if not low and np.shape(remainder) != ():
        raise TypeError(
            f"parameter {keystr(path())} is {_dtype(param)}, but state.remainder there belongs to "
            "a parameter in 16 bits. Add the updates with optax.apply_updates, which keeps the "
            "parameters' dtype."
        )
    if low and remainder.dtype != dtype:
        raise another_remainder(requested, remainder.dtype, jax.tree_util.keystr(path()))


def another_remainder(requested: str, found: Any, path: str = "") -> ValueError:
    """Returns the error for a remainder that is not in the optimizer's format."""
    found = found or "none"
    return ValueError(
        f"state.remainder{path} is stored in {found}, but this optimizer stores it in {requested}. "
        f"Make the optimizer with remainder={str(found)!r}, or convert parameters and state with "
        "adam_jax.convert_remainder."
    )


def check_state(kind: type[Any], state: Any) -> None:
    """Raises TypeError unless the state is of this kind."""
    if not isinstance(state, kind):
        raise TypeError(
            f"expected the {kind.__name__} that init returns, got {type(state).__name__}. A "
            "checkpoint restored without a target loses its types: restore it onto the state "
            "from init."
        )


def check_states(expected: Any, state: Any) -> None:
    """Raises TypeError unless a tuple of states has the expected types."""
    names = _type_names(expected)
    if _type_names(state) != names:
        raise TypeError(
            f"expected the state that init returns, {names}, got {_type_names(state)}. An "
            "optimizer with a schedule and one without have different states. A checkpoint "
            "restored without a target loses its types: restore it onto the state from init."
        )


def _type_names(state: Any) -> str:
    if isinstance(state, optax.MaskedState):
        return f"MaskedState({_type_names(state.inner_state)})"
    if type(state) in (tuple, list):
        names = ", ".join(map(_type_names, state))
        return f"({names})" if isinstance(state, tuple) else f"[{names}]"
    return state.__name__ if isinstance(state, type) else type(state).__name__


def check_real(path: Callable[[], KeyPath], param: Any, format: str | None) -> None:
    """Raises TypeError for a complex parameter if `format`, that of mu, holds real numbers only."""
    if format in ("bfloat16", "int8") and jnp.iscomplexobj(param):
        raise TypeError(
            f"parameter {keystr(path())} has dtype {_dtype(param)}, and mu_dtype={format!r} holds "
            "real numbers only. Use mu_dtype='float32' for it: mu_dtype may be a tree of formats."
        )


def flatten_up_to(
    treedef: Any, like: Any, tree: Any, name: str, *, of: str = "gradients"
) -> list[Any]:
    """Returns the subtree of `tree` at every leaf of `like`.

    Raises ValueError, naming the path, if there is no such subtree.
    """
    try:
        return treedef.flatten_up_to(tree)
    except ValueError as error:
        ours, theirs = _paths(like), _paths(tree)
        differences = [f"{path} is missing in {name}" for path in ours if path not in theirs]
        differences += [f"{path} is only in {name}" for path in theirs if path not in ours]
        detail = differences[0] if differences else str(error)
        raise ValueError(
            f"the {of} and {name} have different tree structures: {detail}. Pass {of} with the "
            "structure of the parameters that init was called with."
        ) from error


def leaf_path(tree: Any, i: int) -> KeyPath:
    """Returns the path of the i-th leaf, counting None as a leaf.

    It is computed for errors only, so that no step pays for it.
    """
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_none)[0][i][0]


def keystr(path: KeyPath) -> str:
    """Returns a leaf's path in the form that indexes the tree."""
    return jax.tree_util.keystr(path) or "(the only leaf)"


def _paths(tree: Any) -> list[str]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_none)
    return [keystr(path) for path, _ in leaves]


def _dtype(leaf: Any) -> Any:
    return getattr(leaf, "dtype", None) or jnp.result_type(leaf)


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")

"""What callers can get wrong, found while tracing: hyperparameters, and trees that don't fit.

Only concrete numbers are checked. Inside `optax.inject_hyperparams`, `jit` or `vmap` the
hyperparameters are tracers, and a traced value has no range to compare with.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from adam_jax._types import KeyPath, Scalar

T = TypeVar("T")
WITH_MOMENTS = (optax.ScaleByAdamState, optax.ScaleByAmsgradState)


def check_decay(name: str, b: Scalar) -> None:
    """Raises ValueError unless 0 <= b < 1 (a bfloat16 or float16 b may have rounded to 1)."""
    _check_scalar(name, b)
    # `optax.inject_hyperparams` rounds to the parameters' dtype: see `_moments.decay`.
    rounded = isinstance(b, jax.Array) and jnp.finfo(b.dtype).bits < 32
    # As a number: under jit, what is compared with an array is a tracer, whatever the array is.
    if _is_concrete(b) and not (0 <= float(b) < 1 or (rounded and float(b) == 1)):
        raise ValueError(f"{name} must be in [0, 1), got {b}.")


def check_not_negative(name: str, value: Scalar) -> None:
    """Raises ValueError unless 0 <= value < infinity, in float32."""
    _check_scalar(name, value)
    if _is_concrete(value) and not 0 <= float(value) <= float(np.finfo(np.float32).max):
        raise ValueError(f"{name} must be non-negative and finite in float32, got {value}.")


def check_rate(name: str, rate: Any) -> None:
    """Raises TypeError unless every leaf is a schedule, a number, or an array or tracer of one."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(rate, is_leaf=callable):
        if not callable(leaf):
            _check_number(name + (jax.tree_util.keystr(path)), leaf, "a number or a schedule")


def _check_number(name: str, value: Any, expected: str) -> None:
    number = isinstance(value, int | float | np.number | np.ndarray | jax.Array)
    if isinstance(value, bool) or not number:
        raise TypeError(f"{name} must be {expected}, got {value!r}.")


def _check_scalar(name: str, value: Scalar) -> None:
    _check_number(name, value, "a number")
    if np.shape(value) != ():
        raise ValueError(
            f"{name} must be a scalar, got shape {np.shape(value)}. To run several settings at "
            "once, use jax.vmap."
        )


def _is_concrete(value: Scalar) -> bool:
    return not isinstance(value, Tracer)


def check_leaves(what: str, tree: Any) -> None:
    """Raises TypeError unless every leaf has a real or complex floating dtype."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        _check_inexact(what, lambda path=path: path, leaf)


def _check_inexact(what: str, path: Callable[[], KeyPath], leaf: Any) -> None:
    if not jnp.issubdtype(_dtype(leaf), jnp.inexact):
        raise TypeError(
            f"{what} {keystr(path())} has dtype {_dtype(leaf)}; only real and complex floating "
            "dtypes can be optimized. Leave the leaf out with optax.masked, or pass None for it."
        )


def check_leaf(
    path: Callable[[], KeyPath],
    gradient: Any,
    stored: Sequence[Any],
    names: Sequence[str],
) -> None:
    """Checks that a gradient leaf and what is stored for it belong to one parameter."""
    _check_inexact("gradient", path, gradient)
    arrays = [getattr(leaf, "codes", leaf) for leaf in stored]
    for name, moment in zip(names, arrays, strict=True):
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
    for name, leaf in zip(names, stored, strict=True):
        if hasattr(leaf, "scales"):
            rows = (*np.shape(gradient)[:-1], 1) if leaf.codes.dtype == np.uint8 else ()
            if np.shape(leaf.scales) != rows:
                raise ValueError(
                    f"state.{name}.scales{keystr(path())} has shape {np.shape(leaf.scales)}, where "
                    f"gradient and codes have one scale a row, shape {rows}. Pass the state of "
                    "init, or of its checkpoint."
                )
    if jnp.iscomplexobj(gradient) != jnp.iscomplexobj(arrays[0]):
        raise TypeError(
            f"gradient {keystr(path())} has dtype {_dtype(gradient)}, but state.{names[0]} there "
            f"has dtype {_dtype(arrays[0])}. A gradient is complex where its parameter is, and "
            "only there."
        )


def check_param(path: Callable[[], KeyPath], gradient: Any, param: Any) -> None:
    """Checks that a gradient leaf and a parameter belong to each other."""
    _check_inexact("gradient", path, gradient)
    if np.shape(gradient) != np.shape(param):
        raise ValueError(
            f"gradient {keystr(path())} has shape {np.shape(gradient)}, but the parameter there "
            f"has shape {np.shape(param)}. A gradient has its parameter's shape."
        )
    if jnp.iscomplexobj(gradient) != jnp.iscomplexobj(param):
        raise TypeError(
            f"gradient {keystr(path())} has dtype {_dtype(gradient)}, but the parameter there has "
            f"dtype {_dtype(param)}. A gradient is complex where its parameter is, and only there."
        )


def check_remainder(path: Callable[[], KeyPath], param: Any, remainder: Any, *, low: bool) -> None:
    """Checks that a remainder belongs to a parameter, which is `low` if it is in 16 bits."""
    if low and np.shape(remainder) != np.shape(param):
        raise ValueError(
            f"state.remainder{keystr(path())} has shape {np.shape(remainder)}, but the parameter "
            f"has shape {np.shape(param)}. Pass the state that belongs to these parameters."
        )
    if not low and np.shape(remainder) != ():
        raise TypeError(
            f"parameter {keystr(path())} is {_dtype(param)}, but state.remainder there is that of "
            "a parameter in 16 bits. Add the updates with optax.apply_updates, which keeps the "
            "parameters' dtype."
        )


def check_state(kind: type[Any], state: Any) -> None:
    """Raises TypeError unless the state is of this kind."""
    if not isinstance(state, kind):
        raise TypeError(
            f"expected the {kind.__name__} that init returns, got {type(state).__name__}. A "
            "checkpoint restored without a target loses its types: restore it onto the state "
            "from init."
        )


def check_format(name: str, requested: str | None, found: str | None) -> None:
    """Raises ValueError if the state stores a moment in another format than the optimizer."""
    requested, found = requested or "float32", found or "float32"
    if found != requested:
        raise ValueError(
            f"state.{name} is stored in {found}, but this optimizer stores it in {requested}. "
            f"Make the optimizer with {name}_dtype={found!r}, or convert the state with "
            "adam_jax.convert_state."
        )


def check_real(format: str, params: Any) -> None:
    """Raises TypeError if a parameter is complex: mu would be, and `format` has no such numbers."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if jnp.iscomplexobj(leaf):
            raise TypeError(
                f"parameter {keystr(path)} has dtype {_dtype(leaf)}, and mu_dtype={format!r} holds "
                "real numbers only. Use mu_dtype='float32', or optax.multi_transform to store the "
                "moments of complex parameters in another format."
            )


def states_of(kind: type[T], state: Any) -> list[T]:
    """All states of this kind in an optimizer's state, at any depth."""
    is_kind = lambda x: isinstance(x, kind)  # noqa: E731
    return list(filter(is_kind, jax.tree.leaves(state, is_leaf=is_kind)))


def states_with_moments(state: Any) -> list[Any]:
    """Those of `scale_by_adam`, `scale_by_amsgrad` and `scale_by_adamax`, or a ValueError."""
    found = [x for kind in WITH_MOMENTS for x in states_of(kind, state)]
    if not found:
        raise ValueError(
            f"found no state of scale_by_adam, scale_by_amsgrad or scale_by_adamax in "
            f"{type(state).__name__}. A checkpoint restored without a target loses its types: "
            "restore it onto a state from init."
        )
    return found


def only_state(kind: type[T], wrapper: str, state: Any) -> T:
    """The state of this kind in an optimizer's state, or a ValueError unless there is just one."""
    found = states_of(kind, state)
    if len(found) != 1:
        raise ValueError(
            f"expected one {wrapper} state, found {len(found)} in {type(state).__name__}. Pass "
            f"the state of an optimizer that {wrapper} wraps."
        )
    return found[0]


def flatten_up_to(treedef: Any, gradients: Any, tree: Any, name: str) -> list[Any]:
    """The subtree of `tree` at every leaf of the gradients, or a ValueError with the path."""
    try:
        return treedef.flatten_up_to(tree)
    except ValueError as error:
        ours, theirs = _paths(gradients), _paths(tree)
        differences = [f"{path} is missing in {name}" for path in ours if path not in theirs]
        differences += [f"{path} is only in {name}" for path in theirs if path not in ours]
        detail = differences[0] if differences else str(error)
        raise ValueError(
            f"the gradients and {name} have different tree structures: {detail}. Pass gradients "
            "with the structure of the parameters that init was called with."
        ) from error


def leaf_path(tree: Any, i: int) -> KeyPath:
    """The path of the i-th leaf, None being one: only errors need it, so only they pay for it."""
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)[0][i][0]


def keystr(path: KeyPath) -> str:
    """A leaf's path as it would be written to index the tree."""
    return jax.tree_util.keystr(path) or "(the only leaf)"


def _paths(tree: Any) -> list[str]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)
    return [keystr(path) for path, _ in leaves]


def _dtype(leaf: Any) -> Any:
    return getattr(leaf, "dtype", None) or jnp.result_type(leaf)


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")

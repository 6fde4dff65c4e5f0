"""How a moment is kept between steps: what it starts as, how it is read, how it is written."""

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from adam_jax._moments import arithmetic_dtype, real_dtype
from adam_jax._types import Leaf, StorageFormat

_FORMATS = ("float32",)


def storage_format(name: str, requested: StorageFormat) -> str | None:
    """Validates the argument `name`, which says how a moment is stored.

    None, the default, is float32, and float64 where the parameter is float64 or complex128.
    """
    if requested is None:
        return None
    try:
        format = np.dtype(requested).name
    except TypeError:
        format = ""
    if format not in _FORMATS:
        raise ValueError(
            f"{name} must be None or one of {', '.join(map(repr, _FORMATS))} (or the dtype of "
            f"that name), got {requested!r}."
        )
    return format


def zeros(format: str | None, param: ArrayLike, *, real: bool) -> Leaf:
    """The initial moment of a parameter: zeros of its shape, of a real dtype if `real`."""
    dtype = arithmetic_dtype(jnp.result_type(param))
    if format is not None and jnp.finfo(dtype).bits > 32:
        dtype = np.dtype(np.complex64 if jnp.iscomplexobj(param) else format)
    return jnp.zeros_like(param, dtype=real_dtype(dtype) if real else dtype)


def load(stored: Leaf, dtype: DTypeLike) -> Leaf:
    """A stored moment in the arithmetic's real dtype, or in its complex one if it is complex."""
    return stored.astype(arithmetic_dtype(stored.dtype, dtype))


def store(moment: Leaf, like: Leaf) -> Leaf:
    """A moment in the format in which the state keeps it: that of its predecessor, `like`."""
    return moment.astype(like.dtype)

"""How a moment is kept between steps: what it starts as, how it is read, how it is written."""

import jax
import jax.numpy as jnp
import numpy as np

from adam_jax._moments import real_dtype
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
        format = None
    if format not in _FORMATS:
        raise ValueError(
            f"{name} must be None or one of {', '.join(map(repr, _FORMATS))} (or the dtype of "
            f"that name), got {requested!r}."
        )
    return format


def zeros(format: str | None, param: Leaf, *, real: bool) -> Leaf:
    """The initial moment of a parameter: zeros of its shape, of a real dtype if `real`."""
    dtype = jnp.result_type(param)
    wide = jnp.dtype(format or jnp.promote_types(real_dtype(dtype), jnp.float32))
    if jnp.issubdtype(dtype, jnp.complexfloating) and not real:
        wide = jnp.result_type(wide, jnp.complex64)
    return jnp.zeros_like(param, dtype=wide)


def load(stored: Leaf, dtype: jax.typing.DTypeLike) -> Leaf:
    """A stored moment in the dtype of the arithmetic (which is real for a real moment)."""
    return stored.astype(jnp.promote_types(stored.dtype, dtype))


def store(moment: Leaf, like: Leaf) -> Leaf:
    """A moment in the format in which the state keeps it: that of its predecessor, `like`."""
    return moment.astype(like.dtype)

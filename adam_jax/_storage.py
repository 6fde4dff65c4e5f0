"""Defines storage formats by name, and the state of a leaf before its first step."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from adam_jax._codec import Rows, Stored
from adam_jax._moments import arithmetic_dtype, real_dtype
from adam_jax._types import StorageFormat, StorageFormats, is_none

FORMATS = ("float32", "bfloat16", "int8")
SMALLEST_INT8_LEAF = 4096  # elements; smaller leaves, and leaves with
SHORTEST_INT8_ROW = 32  # shorter rows, do not justify a scale for each row
MAXIMUM = (
    "is a maximum over time, and a maximum of stochastically rounded numbers keeps the largest "
    "rounding error, so that steps would be too short for good"
)


class Int8Moment(NamedTuple):
    """nu of an optimizer that stores moments in int8: three trees.

    Each row of a leaf (its last axis) has a scale, the unit of its codes of nu, and another unit
    for its codes of mu. `adam_jax.convert_state` converts them to numbers. A leaf whose nu is not
    coded, because it has fewer than 4096 elements, a last axis shorter than 32 or another format,
    stores nu itself in `codes`.

    Attributes:
        codes: uint8, shaped like the parameter; or nu itself.
        scales: float32, (..., 1): for each row, the same average as nu, of its largest $|g|^2$;
            of shape () if nu is not coded.
        units: float32, (..., 1), with a checksum of scale and unit in the lowest 12 bits; of shape
            () if neither moment is coded.
    """

    codes: Any
    scales: Any
    units: Any


def storage_formats(
    name: str, requested: StorageFormats, *, not_int8: str | None = None
) -> StorageFormats:
    """Returns the names of the formats in the argument `name`, a tree prefix of the parameters.

    None, the default, is float32, and float64 where the parameter is float64 or complex128.
    `not_int8` is the reason if the moment cannot be stored in int8.
    """

    def named(requested: StorageFormat) -> str | None:
        if requested is None:
            return None
        try:
            format = np.dtype(requested).name
        except TypeError:
            format = ""
        if format not in FORMATS:
            raise ValueError(
                f"{name} must be None or one of {', '.join(map(repr, FORMATS))} (or the dtype of "
                f"that name), or a tree of these, got {requested!r}."
            )
        if format == "int8" and not_int8:
            raise ValueError(f"{name} can't be 'int8' here: {not_int8}. Use 'bfloat16' instead.")
        return format

    return jax.tree.map(named, requested, is_leaf=is_none)


def fits_int8(shape: tuple[int, ...]) -> bool:
    """Returns whether a leaf of this shape is stored in int8 if the user requests int8."""
    return shape[-1:] >= (SHORTEST_INT8_ROW,) and math.prod(shape) >= SMALLEST_INT8_LEAF


def stored_dtype(
    format: str | None, shape: tuple[int, ...], dtype: DTypeLike, *, code: DTypeLike
) -> np.dtype[Any]:
    """Returns the dtype in which a moment of a leaf of this shape and dtype is stored."""
    if format is None:
        return arithmetic_dtype(dtype)
    if format == "int8" and fits_int8(shape):
        return np.dtype(code)
    if format == "bfloat16":
        return np.dtype(jnp.bfloat16)
    return np.dtype(np.complex64 if jnp.issubdtype(dtype, jnp.complexfloating) else np.float32)


def stores(moment: Any, format: str | None, *, code: DTypeLike) -> bool:
    """Returns whether a moment is stored in this format.

    Codes may be those of a few rows, or of one layer, of a leaf that is large enough.
    """
    dtype = moment.dtype
    if format == "int8" and dtype == code:
        return True
    if format is None:
        return arithmetic_dtype(dtype) == dtype if jnp.issubdtype(dtype, jnp.inexact) else False
    return dtype == stored_dtype(format, moment.shape, dtype, code=code)


def initial(param: ArrayLike, mu: str | None, nu: str | None, others: int = 0) -> Stored:
    """Returns the moments of a parameter before its first step, in these formats: zeros."""
    shape, dtype = np.shape(param), jnp.result_type(param)
    mu_dtype = stored_dtype(mu, shape, arithmetic_dtype(dtype), code=np.int8)
    nu_dtype = stored_dtype(nu, shape, real_dtype(arithmetic_dtype(dtype)), code=np.uint8)
    zeros = [jnp.zeros_like(param, dtype=x) for x in (mu_dtype, *[nu_dtype] * (1 + others))]
    nu_is_coded = nu_dtype == np.uint8
    coded = nu_is_coded, nu_is_coded or mu_dtype == np.int8
    rows = Rows(
        *(
            zeros_along(param, (*shape[:-1], 1), jnp.float32) if yes else jnp.zeros((), jnp.float32)
            for yes in coded
        )
    )
    return Stored(zeros[0], zeros[1], tuple(zeros[2:]), rows)


def zeros_along(param: Any, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """Returns zeros sharded like the first axes of a parameter; other axes have size 1."""
    sharding = param.sharding if _is_concrete(param) else jax.typeof(param).sharding
    if not isinstance(sharding, NamedSharding) or sharding.mesh.empty:
        return jnp.zeros(shape, dtype)
    parts = zip([*sharding.spec, *[None] * len(shape)], shape, param.shape, strict=False)
    spec = PartitionSpec(*(part if m == n else None for part, m, n in parts))
    sharding = NamedSharding(sharding.mesh, spec)
    if _is_concrete(param):
        return jnp.zeros(shape, dtype, device=sharding)
    return jax.lax.broadcast(jnp.zeros((), dtype), shape, out_sharding=sharding)


def _is_concrete(param: Any) -> bool:
    """Returns whether a parameter, or its `jax.ShapeDtypeStruct`, has a sharding of its own."""
    known = isinstance(param, jax.Array | jax.ShapeDtypeStruct)
    return known and not isinstance(param, Tracer)

"""How the moments are kept between steps: what they start as, how they are read and written.

A moment is stored in float32 (or wider), in bfloat16 or in int8. Which of them a leaf is in, its
dtype says: there is nothing else to look up. Stochastic rounding, where there is any, compares
with thresholds that are a random phase for each element, turned by the golden ratio each step.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from adam_jax import _int8
from adam_jax._moments import arithmetic_dtype, real_dtype
from adam_jax._rounding import centred, join, nearest, random_bits, split, turned
from adam_jax._types import Leaf, RealLeaf, StorageFormat, Word, Words

FORMATS = ("float32", "bfloat16", "int8")
SMALLEST_INT8_LEAF = 4096  # elements; smaller leaves, and those with
SHORTEST_INT8_ROW = 32  # shorter rows, are not worth a scale for each row


class Int8Moment(NamedTuple):
    """A second moment stored in int8: two trees, each shaped like the parameter tree.

    A leaf that is too small for 8 bits (fewer than 4096 elements, or a last axis shorter than
    32) has its moment itself in `codes`, in float32, and a scale of shape ().

    Attributes:
        codes: uint8, shaped like the parameter.
        scales: float32, (..., 1): for each row, the same average as nu, of its largest |g|^2.
    """

    codes: Any
    scales: Any


Moments = tuple[Leaf, RealLeaf, *tuple[RealLeaf, ...]]  # of one leaf: mu, nu and others
Second = jax.Array | Int8Moment  # one leaf of nu
Stored = tuple[jax.Array, Second, *tuple[jax.Array, ...]]  # one leaf of mu, of nu, and of others


class Moment(NamedTuple):
    """A moment's storage format, and whether it is real for a complex parameter."""

    format: str | None
    real: bool

    @property
    def is_struct(self) -> bool:
        """Whether the state has it as an `Int8Moment` of trees, and not as a tree."""
        return self.real and self.format == "int8"


class Draw(NamedTuple):
    """Which random numbers a leaf's rounding takes."""

    leaf: Word  # the position of the leaf in its tree
    step: Word

    def words(self, shape: tuple[int, ...]) -> tuple[Words, Words]:
        """Random words for mu and for nu, from one hash."""
        phase = random_bits(shape, self.leaf)
        other = (phase << np.uint32(16)) | (phase >> np.uint32(16))
        return turned(other, self.step), turned(phase, self.step)


def storage_format(
    name: str, requested: StorageFormat, *, not_int8: str | None = None
) -> str | None:
    """Validates the argument `name`, which says how a moment is stored.

    None, the default, is float32, and float64 where the parameter is float64 or complex128.
    `not_int8` says why the moment can't be stored in int8, if it can't.
    """
    if requested is None:
        return None
    try:
        format = np.dtype(requested).name
    except TypeError:
        format = ""
    if format not in FORMATS:
        raise ValueError(
            f"{name} must be None or one of {', '.join(map(repr, FORMATS))} (or the dtype of "
            f"that name), got {requested!r}."
        )
    if format == "int8" and not_int8:
        raise ValueError(f"{name} can't be 'int8' here: {not_int8}. Use 'bfloat16' instead.")
    return format


def stored_dtype(moment: Moment, shape: tuple[int, ...], dtype: DTypeLike) -> np.dtype[Any]:
    """The dtype in which the moment of a parameter of this shape and dtype is stored."""
    wide = arithmetic_dtype(dtype)
    if moment.real:
        wide = real_dtype(wide)
    if moment.format is None:
        return wide
    if moment.format == "int8" and fits_int8(shape):
        return np.dtype(np.uint8 if moment.real else np.int8)
    if moment.format == "bfloat16":
        return np.dtype(jnp.bfloat16)
    return np.dtype(np.complex64 if jnp.issubdtype(wide, jnp.complexfloating) else np.float32)


def fits_int8(shape: tuple[int, ...]) -> bool:
    """Whether a leaf of this shape is stored in int8 where that was asked for."""
    return shape[-1:] >= (SHORTEST_INT8_ROW,) and math.prod(shape) >= SMALLEST_INT8_LEAF


def format_of(tree: Any, requested: str | None) -> str | None:
    """The format in which a moment is stored; the requested one where nothing tells otherwise."""
    if isinstance(tree, Int8Moment):
        return "int8"
    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")]
    if not leaves:
        return requested
    for format in ("int8", "bfloat16"):
        if any(leaf.dtype == format for leaf in leaves):
            return format
    small = not any(fits_int8(leaf.shape) for leaf in leaves)
    return "int8" if requested == "int8" and small else None


def zeros(moment: Moment, param: ArrayLike) -> Second:
    """The initial moment of a parameter."""
    shape = np.shape(param)
    dtype = stored_dtype(moment, shape, jnp.result_type(param))
    codes = jnp.zeros_like(param, dtype=dtype)
    if not moment.is_struct:
        return codes
    if not fits_int8(shape):
        return Int8Moment(codes, jnp.zeros((), jnp.float32))
    # Made of the codes, so that outside jit the scales lie where the rows do.
    return Int8Moment(codes, codes[..., :1].astype(jnp.float32))


def to_leaves(tree: Any, flatten: Callable[[Any, str], list[Any]]) -> list[Second]:
    """The leaves of a moment. `flatten` does it to a tree, and is told which one for its errors."""
    if not isinstance(tree, Int8Moment):
        return flatten(tree, "")
    return list(map(Int8Moment, flatten(tree.codes, ".codes"), flatten(tree.scales, ".scales")))


def to_tree(leaves: Sequence[Second], unflatten: Callable[[Any], Any], moment: Moment) -> Any:
    """The inverse of `to_leaves`: a tree, or a struct of trees."""
    if not moment.is_struct:
        return unflatten(leaves)
    codes, scales = zip(*leaves, strict=True) if leaves else ((), ())
    return Int8Moment(unflatten(codes), unflatten(scales))


def float_dtypes(stored: Stored) -> list[np.dtype[Any]]:
    """The dtypes of those of a leaf's moments that are not codes, and of scales."""
    parts = [scale if scale is not None else codes for codes, scale in map(_parts, stored)]
    return [x.dtype for x in parts if jnp.issubdtype(x.dtype, jnp.inexact)]


def scale_of(stored: Stored, dtype: DTypeLike) -> RealLeaf | None:
    """The scales of nu's rows, if it is stored in codes."""
    _, scale = _parts(stored[1])
    return None if scale is None else scale.astype(dtype)


def load(stored: Stored, dtype: DTypeLike, step: Word) -> Moments:
    """One leaf's moments, mu, nu and perhaps another, in the arithmetic's real dtype.

    `step` is the count with which they were encoded.
    """
    mu, nu, *others = stored
    codes, scale = _parts(nu)
    levels = _levels(mu, codes)
    if levels == _int8.SHARED:
        mu, codes = _int8.split(mu, codes)
    if scale is None:
        v = z = _widen(codes, dtype)
        unit = None
    else:
        unit = scale.astype(dtype)
        z = _int8.decode_nu(codes, levels.nu)
        v = z.astype(dtype) * unit
    if levels.mu:
        m = _int8.decode_mu(mu, _unit_of_mu(z, unit, step), levels.mu)
    else:
        m = _widen(mu, dtype)
    return (m, v, *(_widen(x, dtype) for x in others))


def at_smallest(stored: Stored) -> jax.Array:
    """Where a leaf's nu is the smallest number that its format has: code 0, or 0."""
    mu, nu, *_ = stored
    codes, _ = _parts(nu)
    if _levels(mu, codes) == _int8.SHARED:
        _, codes = _int8.split(mu, codes)
    return codes == 0


def encode(
    moments: Moments, like: Stored, scale: RealLeaf | None, draw: Draw | None
) -> tuple[Any, Moments]:
    """One leaf's moments in the formats of their predecessors, `like`, and their values there.

    The first is for `unpack` to finish. `scale` is at least the largest nu of each row, and None
    unless nu is in int8. `draw` may be None if nothing is in int8 or bfloat16. Moments beyond the
    second are rounded to nearest.
    """
    m, v, *others = moments
    dtype = v.dtype
    mu_like, nu_like, *others_like = like
    codes_like, _ = _parts(nu_like)
    levels = _levels(mu_like, codes_like)
    mu_words, nu_words = draw.words(v.shape) if draw else (None, None)
    if scale is not None and nu_words is not None:
        unit = scale
        codes, z = _int8.encode_nu(
            v * (1 / jnp.maximum(unit, jnp.finfo(dtype).tiny)), centred(nu_words), levels.nu
        )
        v = z.astype(dtype) * unit
    else:
        codes = _rounded(v, codes_like.dtype, nu_words)
        v = z = _widen(codes, dtype)
        unit = None
    if levels.mu and draw is not None and mu_words is not None:
        # In units of nu as it will be read: rounding nu must not change mu.
        q = _unit_of_mu(z, unit, draw.step)
        mu, m = _int8.encode_mu(m, q, centred(mu_words), levels.mu)
    else:
        mu = _rounded(m, mu_like.dtype, mu_words)
        m = _widen(mu, dtype)
    others = [nearest(x, like.dtype) for x, like in zip(others, others_like, strict=True)]
    stored = (m, v, *(_widen(x, dtype) for x in others))
    if levels == _int8.SHARED:
        return _int8.join(mu, codes), stored
    return (mu.astype(mu_like.dtype), codes.astype(codes_like.dtype), *others), stored


def unpack(encoded: Any, like: Stored, scale: RealLeaf | None) -> Stored:
    """What `encode` returned first, as the state has it; the inverse of `load`."""
    nu_like = like[1]
    if not isinstance(encoded, tuple):
        encoded = _int8.bytes_of(encoded)
    mu, nu, *others = encoded
    if isinstance(nu_like, Int8Moment):
        nu = Int8Moment(nu, nu_like.scales if scale is None else scale.astype(jnp.float32))
    return (mu, nu, *others)


def fitted(
    function: Callable[..., tuple[Any, Moments]],
    dtype: DTypeLike,
    gradient: Leaf,
    stored: Stored,
    scale: RealLeaf | None,
    draw: Draw | None,
) -> tuple[Any, Moments]:
    """function(*args), which returns what `encode` does, in the form that each compiler needs.

    `dtype` is the arithmetic's real one, as for `load`; what follows it are the args.

    XLA for CPU makes one pass for each output of a step, and would decode, average and encode
    anew in each of them, with copies of the old moments for those that come too late. It does not
    look through a condition, even one that always holds; what passes it are the codes alone. XLA
    for TPU makes one pass of a step if all that follows is made of the codes, XLA for GPU anyway,
    and there values that are at hand cost less.
    """
    args = gradient, stored, scale, draw
    mu, nu, *others = stored
    codes, _ = _parts(nu)
    levels = _levels(mu, codes)
    if draw is None or not any(levels):
        return function(*args)
    step = draw.step

    def of_codes(encoded: Any) -> tuple[Any, Moments]:
        return encoded, load(unpack(encoded, stored, scale), dtype, step)

    def encoded(*args: Any) -> Any:
        return function(*args)[0]

    def unchanged(*_: Any) -> Any:
        if levels == _int8.SHARED:
            return _int8.join(*_int8.split(mu, codes))
        return (mu, codes, *others)

    return jax.lax.platform_dependent(
        *args,
        cpu=lambda *args: of_codes(jax.lax.cond(step > 0, encoded, unchanged, *args)),
        tpu=lambda *args: of_codes(encoded(*args)),
        default=function,
    )


def _parts(nu: Second) -> tuple[jax.Array, jax.Array | None]:
    """The array that holds nu or its codes, and if they are codes, the scales of its rows."""
    if not isinstance(nu, Int8Moment):
        return nu, None
    return nu.codes, nu.scales if nu.codes.dtype == jnp.uint8 else None


def _levels(mu: jax.Array, nu: jax.Array) -> _int8.Levels:
    """How many codes each moment has: 0 if it isn't stored in codes."""
    coded = mu.dtype == jnp.int8, nu.dtype == jnp.uint8
    if all(coded):
        return _int8.SHARED
    return _int8.Levels(*(n if yes else 0 for yes, n in zip(coded, _int8.ALONE, strict=True)))


def _unit_of_mu(z: RealLeaf, unit: RealLeaf | None, step: Word) -> RealLeaf:
    """What mu in int8 counts in, given the stored nu, in units of its row where it has some."""
    if unit is None:
        limits = jnp.finfo(jnp.float32)
        unit = jnp.ones((), z.dtype)
        z = jnp.clip(z, limits.tiny, limits.max).astype(jnp.float32)
    return _int8.unit_of_mu(z, unit, step)


def _widen(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    return x.astype(arithmetic_dtype(x.dtype, dtype))


def _rounded(x: Leaf, dtype: DTypeLike, words: Words | None) -> Leaf:
    """Rounds to nearest, and to bfloat16 at random."""
    # A moment that moves by less than half an ulp a step would, to nearest, never move.
    if dtype != jnp.bfloat16 or words is None:
        return nearest(x, dtype)
    rounded, _ = split(x.astype(jnp.float32), dtype, kept=0, bits=words)
    # The cast changes nothing but makes XLA on CPU keep the result, which it would otherwise
    # compute again for the step, with a copy of the old moment.
    return join(rounded).astype(dtype)

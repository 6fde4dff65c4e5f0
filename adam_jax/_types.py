"""Names for the types in signatures, and predicates on leaves."""

from collections.abc import Callable, Collection
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Complex, Float, Int, Integer, PyTree, UInt32

Leaf = Float[Array, "*leaf"] | Complex[Array, "*leaf"]  # a gradient, a parameter or mu
RealLeaf = Float[Array, "*leaf"]  # nu, and other arrays of magnitudes
Words = UInt32[Array, "*leaf"]  # 32 bits for each element
Codes = Int[Array, "*leaf"]  # whole numbers that stand for values
Word = UInt32[Array, ""] | np.integer[Any]
# A number, a 0-d array or a tracer of one.
Scalar = float | int | np.number[Any] | Float[Array, ""] | Integer[Array, ""]

Rate = Scalar | optax.Schedule | PyTree[Scalar | optax.Schedule]  # of learning or decay
Mask = PyTree[bool] | Callable[[optax.Params], PyTree[bool]]
KeyPath = tuple[Any, ...]  # as in jax.tree_util, with its type argument
StorageFormat = str | DTypeLike | None
StorageFormats = StorageFormat | PyTree[StorageFormat]


def is_function(types: Collection[type[Any]], x: Any) -> bool:
    """Returns whether x is a function, given the types of the parameters' containers.

    Some containers can be called, such as the modules of Equinox: rates or a mask in one of these
    are a tree. Other frameworks make functions into containers.
    """
    return callable(x) and type(x) not in types


LOW_PRECISION = (np.dtype(jnp.bfloat16), np.dtype(np.float16))


def is_low(leaf: Any) -> bool:
    """Returns whether a parameter has 16 bits, so that `master_weights` trains it in more."""
    return getattr(leaf, "dtype", np.float32) in LOW_PRECISION


def is_none(x: Any) -> bool:
    """Returns whether x is None, for trees in which None is a leaf."""
    return x is None


def is_masked(x: Any) -> bool:
    """Returns whether optax has masked a leaf or a subtree, as one of another group."""
    return isinstance(x, optax.MaskedNode)

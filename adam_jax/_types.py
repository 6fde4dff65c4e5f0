"""What signatures share: names for types, and what counts as a leaf."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Complex, Float, Int, Integer, PyTree, UInt32

Leaf = Float[Array, "*leaf"] | Complex[Array, "*leaf"]  # a gradient, a parameter or mu
RealLeaf = Float[Array, "*leaf"]  # nu, and whatever else is made of magnitudes
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


def is_function(x: Any) -> bool:
    """Whether x is a function, and no tree that can be called, such as a module of Equinox."""
    children = jax.tree.leaves(x, is_leaf=lambda node: node is not x)
    is_leaf = not children or children[0] is x
    # `jax.tree_util.Partial`, too, which is a tree.
    return callable(x) and (isinstance(x, functools.partial) or is_leaf)


def is_none(x: Any) -> bool:
    """Whether x is None, for trees in which None is a leaf."""
    return x is None

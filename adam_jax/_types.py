"""What signatures share: names for types, and what counts as a leaf."""

from collections.abc import Callable
from typing import Any

import numpy as np
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Complex, Float, Int, PyTree, UInt32

Leaf = Float[Array, "*leaf"] | Complex[Array, "*leaf"]  # a gradient, a parameter or mu
RealLeaf = Float[Array, "*leaf"]  # nu, and whatever else is made of magnitudes
Words = UInt32[Array, "*leaf"]  # 32 bits for each element
Codes = Int[Array, "*leaf"]  # whole numbers that stand for values
Word = UInt32[Array, ""] | np.integer[Any]
Scalar = float | np.floating[Any] | Float[Array, ""]  # a number, a 0-d array or a tracer of one

LearningRate = Scalar | optax.Schedule | PyTree[Scalar | optax.Schedule]
WeightDecay = Scalar | optax.Schedule
Mask = PyTree[bool] | Callable[[optax.Params], PyTree[bool]]
KeyPath = tuple[Any, ...]  # as in jax.tree_util, with its type argument
StorageFormat = str | DTypeLike | None
StorageFormats = StorageFormat | PyTree[StorageFormat]


def is_none(x: Any) -> bool:
    """Whether x is None, for trees in which None is a leaf."""
    return x is None

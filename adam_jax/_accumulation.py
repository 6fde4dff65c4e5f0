"""Adds up the gradients of several microbatches in one buffer."""

# Annotations stay text: cloudpickle then has no types to pickle along with a function.
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import tree_leaves_with_path

from adam_jax._backward import Backward, check_layers
from adam_jax._checks import check_choice, check_leaves, keystr
from adam_jax._moments import arithmetic_dtype
from adam_jax._rounding import Draw, draws, mix, split
from adam_jax._scan import Leaves, one_layer
from adam_jax._sharding import zeros_of
from adam_jax._state import mask_per_leaf
from adam_jax._types import Leaf, Mask

_BUFFERS = ("float32", "bfloat16")


def accumulated_value_and_grad(
    loss: Callable[..., Any],
    *,
    layers: Mask = False,
    buffer: str = "float32",
    has_aux: bool = False,
) -> Callable[..., Any]:
    """Differentiates a loss over microbatches, and adds up their gradients in one buffer.

    The buffer has the shapes of the parameters. In float32, sums are as exact as gradients of
    float32 parameters; summing the gradients of bfloat16 parameters in bfloat16 would lose
    everything below half an ulp of the sum. A bfloat16 buffer takes half of the memory, and each
    sum is rounded stochastically, without bias.

        value_and_grad = adam_jax.accumulated_value_and_grad(loss)
        value, gradients = value_and_grad(params, microbatches)
        updates, state = optimizer.update(gradients, state, params)

    Before they are added, the gradients of one microbatch are a second tree, in the dtypes of the
    parameters. `layers` avoids that tree for stacked layers that go through `jax.lax.scan`: as with
    `value_and_update`, the backward pass holds one layer's gradients at a time, and adds them to
    the buffer at once.

    Args:
        loss: `loss(params, microbatch)` returns a scalar, or with `has_aux` a scalar and a tree.
            With `layers` it is called as `loss(params, microbatch, scan=scan)`, under the
            conditions that `value_and_update` states.
        layers: which parameters are stacked over layers, along their first axis, and go through
            `scan`: a tree of bools that is a prefix of the parameter tree, or a function from the
            parameters to one. False, the default: none.
        buffer: `"float32"` or `"bfloat16"`. Wider leaves and complex ones always have a buffer of
            their own dtype.
        has_aux: whether the loss returns a tree as well as its value.

    Returns:
        `value_and_grad(params, microbatches, *, step=None)`, which returns the means of the values
        and of the gradients over microbatches. The first axis of each leaf of `microbatches` counts
        them. With `has_aux` it returns `(value, aux), gradients`, with the trees stacked along a
        new first axis. `step` is the number of the training step, an integer that may be traced. It
        selects the random bits that round a bfloat16 buffer, which requires it.

    Raises:
        ValueError: for another `buffer`, and for microbatches whose first axes differ or are
            missing; with `layers`, for a loss that breaks the conditions of `value_and_update`.
        TypeError: for a parameter of integer dtype, for a leaf of `layers` that is no bool, and
            without `step` where the buffer needs it.

    Examples:
        >>> import adam_jax, jax.numpy as jnp
        >>> def loss(params, batch):
        ...     return jnp.mean((batch @ params) ** 2)
        >>> value_and_grad = adam_jax.accumulated_value_and_grad(loss)
        >>> microbatches = jnp.arange(8.0).reshape(4, 1, 2)  # four of one row
        >>> value_and_grad(jnp.ones(2), microbatches)
        (Array(69., dtype=float32), Array([62., 76.], dtype=float32))
    """
    check_choice("buffer", buffer, _BUFFERS)

    def value_and_grad(params: optax.Params, microbatches: Any, *, step: Any = None) -> Any:
        check_leaves("parameter", params)
        stacked = mask_per_leaf("layers", layers, params)
        check_layers([keystr(path) for path, _ in tree_leaves_with_path(params)], stacked)
        number = _number_of(microbatches)
        leaves, tree = jax.tree.flatten(params)
        dtypes = [_buffer_dtype(p, buffer) for p in leaves]
        seed = _seed(step, buffer)

        def one(totals: Leaves, x: tuple[jax.Array, Any]) -> tuple[Leaves, Any]:
            i, microbatch = x
            adders = [_Adder(number, draw) for draw in draws(len(leaves), seed + i)]
            if not any(stacked):
                differentiated = jax.value_and_grad(loss, has_aux=has_aux)
                result, gradients = differentiated(params, microbatch)
                gradients = jax.tree.leaves(gradients)
                return [
                    add(total, gradient)
                    for add, total, gradient in zip(adders, totals, gradients, strict=True)
                ], result
            new = list(totals)
            backward = Backward(loss, params, stacked, has_aux)
            result, gradients = backward(lambda own: _Layers(adders, own, new), microbatch)
            for k, gradient in zip(backward.rest, gradients, strict=True):
                new[k] = adders[k](totals[k], gradient)
            return new, result

        zeros = [
            zeros_of(jax.typeof(p).update(dtype=dtype, weak_type=False))
            for p, dtype in zip(leaves, dtypes, strict=True)
        ]
        places = jnp.arange(number, dtype=jnp.uint32)
        totals, results = jax.lax.scan(one, zeros, (places, microbatches))
        value, aux = results if has_aux else (results, None)
        value = jnp.mean(value)
        return (value, aux) if has_aux else value, tree.unflatten(totals)

    return value_and_grad


class _Adder(NamedTuple):
    """Adds a microbatch's share to the mean of a leaf's gradients."""

    number: int  # of microbatches
    draw: Draw

    def __call__(self, total: Leaf, gradient: Leaf, place: jax.Array | None = None) -> Leaf:
        """Returns the new total. With a place, both arguments are that layer of a stack."""
        dtype = arithmetic_dtype(total.dtype)
        with jax.numpy_dtype_promotion("standard"):  # complex leaves meet a real number
            new = total.astype(dtype) + gradient.astype(dtype) / np.float32(self.number)
        if total.dtype != jnp.bfloat16:
            return new
        positions = None if place is None else place[None]
        bits = self.draw._replace(positions=positions).independent(total)
        rounded, _ = split(new, jnp.bfloat16, width=0, bits=bits)
        return rounded


class _Layers:
    """Adds each layer's gradients to the totals of its stacks: the consumer of a scan."""

    def __init__(self, adders: Sequence[_Adder], own: list[int], totals: Leaves):
        self._adders = [adders[k] for k in own]
        self._own = own
        self._totals = totals

    def begin(self, params: Leaves) -> tuple[Leaves, Leaves]:
        """Returns the parameters and the totals of all layers."""
        return params, [self._totals[k] for k in self._own]

    def params(self, carry: tuple[Leaves, Leaves], place: jax.Array) -> Leaves:
        """Returns one layer's parameters."""
        return one_layer(carry[0], place)

    def consume(
        self, carry: tuple[Leaves, Leaves], place: jax.Array, gradients: Leaves, rest: Any
    ) -> tuple[tuple[Leaves, Leaves], Any]:
        """Returns the totals with one layer's gradients."""
        params, totals = carry
        new = [
            jax.lax.dynamic_update_slice_in_dim(
                total, add(one_layer(total, place), gradient, place), place, 0
            )
            for add, total, gradient in zip(self._adders, totals, gradients, strict=True)
        ]
        return (params, new), rest

    def end(self, carry: tuple[Leaves, Leaves]) -> None:
        """Stores the totals."""
        for k, total in zip(self._own, carry[1], strict=True):
            self._totals[k] = total


def _buffer_dtype(param: Any, buffer: str) -> Any:
    dtype = arithmetic_dtype(jnp.result_type(param))
    return jnp.dtype(buffer) if dtype == np.float32 else dtype


def _seed(step: Any, buffer: str) -> jax.Array:
    if step is None:
        if buffer == "bfloat16":
            raise TypeError(
                "a bfloat16 buffer is rounded stochastically, with other random bits in each "
                "step. Pass the number of the training step, as in "
                "value_and_grad(params, microbatches, step=i)."
            )
        step = 0
    return mix(jnp.asarray(step).astype(jnp.uint32))


def _number_of(microbatches: Any) -> int:
    """Returns the length of the first axis, which all leaves must share."""
    shapes = {keystr(path): np.shape(leaf) for path, leaf in tree_leaves_with_path(microbatches)}
    lengths = {shape[:1] for shape in shapes.values()}
    if len(lengths) != 1 or () in lengths or (0,) in lengths:
        found = ", ".join(f"{path} {shape}" for path, shape in shapes.items())
        raise ValueError(
            "all leaves of microbatches must have the microbatches as their first axis, got shapes "
            f"{found or 'of no leaf'}. Split a batch with x.reshape(number, -1, *x.shape[1:])."
        )
    return lengths.pop()[0]

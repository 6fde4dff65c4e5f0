"""Scans over layers, with a backward pass that passes on one layer's gradients at a time.

`jax.lax.scan` stacks the gradients of all layers. Here one `jax.custom_vjp` around the whole scan
has a backward pass of its own: a scan in the other direction, whose carry is what the consumer
makes of the gradients. Both passes save and compute the same as those of `jax.lax.scan`, so
`jax.checkpoint` around the body has the same effect.
"""

# Annotations stay text: cloudpickle then has no types to pickle along with a function.
from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr
from jax.custom_derivatives import SymbolicZero

from adam_jax._sharding import zeros_of

Leaves = list[Any]


class Consumer(Protocol):
    """Consumes the gradients of one scan's layers."""

    def begin(self, params: Leaves) -> Any:
        """Returns the carry before the first gradient, given the parameters of all layers."""
        ...

    def params(self, carry: Any, place: jax.Array) -> Leaves:
        """Returns one layer's parameters, of shape (1, ...)."""
        ...

    def consume(
        self, carry: Any, place: jax.Array, gradients: Leaves, rest: Any
    ) -> tuple[Any, Any]:
        """Returns the carry after one layer's gradients, of shape (1, ...), and the rest unchanged.

        The rest is everything else that the backward pass computes from the layer's parameters,
        which the new carry may overwrite.
        """
        ...

    def end(self, carry: Any) -> None:
        """Takes the carry after the last gradient, in the trace that differentiates."""
        ...


def scan_layers(
    f: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    xs: Any,
    length: int | None,
    reverse: bool,
    unroll: int | bool,
    *,
    stacked: Sequence[bool],
    consumer: Consumer,
    end: Callable[[Any], None],
    tick: jax.Array,
) -> tuple[Any, Any]:
    """Returns the results of `jax.lax.scan`.

    `stacked` marks the leaves of `xs` that are parameters, whose gradients the consumer gets. `end`
    gets the consumer's carry after the last of them, in the trace that differentiates. The backward
    pass runs if a result depends on `tick`, a scalar that is differentiated, even if nothing else
    is differentiated.
    """
    x_leaves = jax.tree.leaves(xs)
    stack = [x for x, yes in zip(x_leaves, stacked, strict=True) if yes]
    others = [x for x, yes in zip(x_leaves, stacked, strict=True) if not yes]
    body, consts, out_tree = _closed(f, init, xs)
    scan = functools.partial(jax.lax.scan, length=length, unroll=unroll)
    count = jnp.arange(stack[0].shape[0], dtype=jnp.int32)

    def flat_body(carry: Leaves, stack: Leaves, others: Leaves, consts: Leaves) -> Any:
        """Returns the leaves of the new carry and of y."""
        of_stack, of_others = iter(stack), iter(others)
        x = [next(of_stack if yes else of_others) for yes in stacked]
        leaves = body(consts, *carry, *x)
        return leaves[: len(carry)], leaves[len(carry) :]

    # The forward pass tells the backward pass this, in addition to arrays.
    pullback: Any = None

    @jax.custom_vjp
    def whole(tick: Any, init: Leaves, others: Leaves, consts: Leaves) -> Any:
        raise AssertionError("scan_layers only works under differentiation")

    def forward(tick: Any, *args: Any) -> Any:
        perturbed = jax.tree.map(lambda x: x.perturbed, args)
        init, others, consts = jax.tree.map(lambda x: x.value, args)

        def layer(carry: tuple[Leaves, Leaves], x: tuple[jax.Array, Leaves]) -> Any:
            nonlocal pullback
            (stack, inner), (place, others) = carry, x
            one = [jnp.squeeze(p, 0) for p in one_layer(stack, place)]
            (inner, y), saved, pullback = _Pullback.of(
                flat_body, perturbed[1:], inner, one, others, consts
            )
            return (_wide(stack, place), inner), (y, saved)

        (params, carry), (ys, saved) = scan(layer, (stack, init), (count, others), reverse=reverse)
        return (carry, ys), (params, saved, others, consts)

    def backward(residuals: Any, cotangents: Any) -> Any:
        params, saved, others, consts = residuals
        carry_bar, ys_bar = pullback.cotangents(*cotangents)

        def layer(carry: Any, x: Any) -> Any:
            consumed, carry_bar, consts_bar = carry
            place, saved, others, y_bar = x
            one = consumer.params(consumed, place)
            stack = [jnp.squeeze(p, 0) for p in one]
            carry_bar, gradients, others_bar, more = pullback.pull(
                saved, stack, others, consts, carry_bar, y_bar
            )
            consumed, (carry_bar, others_bar, more) = consumer.consume(
                consumed, place, [g[None] for g in gradients], (carry_bar, others_bar, more)
            )
            consts_bar = jax.tree.map(jnp.add, consts_bar, more)
            return (consumed, carry_bar, consts_bar), others_bar

        (consumed, carry_bar, consts_bar), others_bar = scan(
            layer,
            (consumer.begin(params), carry_bar, pullback.zeros(consts)),
            (count, saved, others, ys_bar),
            reverse=not reverse,
        )
        end(consumed)
        return None, *pullback.spread(carry_bar, others_bar, consts_bar)

    whole.defvjp(forward, backward, symbolic_zeros=True)
    carry, ys = whole(tick, jax.tree.leaves(init), others, consts)
    return jax.tree.unflatten(out_tree, [*carry, *ys])


def one_layer(stacks: Any, place: jax.Array) -> Any:
    """Returns a layer of each stack, of shape (1, ...)."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, place, 1), stacks)


def _wide(stack: Leaves, place: jax.Array) -> Leaves:
    """Returns stacks unchanged, in a form that XLA for TPU keeps in float32 throughout a loop.

    It multiplies matrices in bfloat16, and would make a bfloat16 copy of all layers for that. It
    makes no such copy of an array that the loop writes to.
    """

    def on_tpu(x: jax.Array, place: jax.Array) -> jax.Array:
        layer = jax.lax.optimization_barrier(one_layer(x, place))
        return jax.lax.dynamic_update_slice_in_dim(x, layer, place, 0)

    def wide(x: jax.Array) -> jax.Array:
        if x.dtype != jnp.float32:
            return x
        return jax.lax.platform_dependent(x, place, tpu=on_tpu, default=lambda x, _: x)

    return list(map(wide, stack))


def _closed(f: Any, init: Any, xs: Any) -> tuple[Callable[..., Leaves], Leaves, Any]:
    """Returns f as a function of leaves, the constants it closes over, and its output structure."""
    x = jax.eval_shape(lambda xs: jax.tree.map(lambda x: x[0], xs), xs)
    jaxpr, out = jax.make_jaxpr(f, return_shape=True)(init, x)
    return (
        functools.partial(eval_jaxpr, jaxpr.jaxpr),
        jaxpr.consts,
        jax.tree.structure(out),
    )


class _Pullback:
    """The transpose of one layer, without the arrays that it needs from the forward pass.

    It differentiates the floating leaves of the carry and of y, the parameters, and those other
    leaves and constants that depend on the user's differentiated arguments.
    """

    def __init__(self, masks: Sequence[Sequence[bool]], y_mask: Sequence[bool], tree: Any):
        self._carry, self._others, self._consts = masks
        self._y = y_mask
        self._tree = tree
        self._sources: list[tuple[int, int] | None] = []

    @classmethod
    def of(
        cls,
        body: Callable[..., tuple[Leaves, Leaves]],
        perturbed: Sequence[Sequence[bool]],
        carry: Leaves,
        stack: Leaves,
        others: Leaves,
        consts: Leaves,
    ) -> tuple[tuple[Leaves, Leaves], Leaves, _Pullback]:
        """Returns the body's results, the residuals to save, and the transpose."""
        carry_mask = list(map(_is_float, carry))
        others_mask, consts_mask = (
            [yes and _is_float(x) for x, yes in zip(leaves, mask, strict=True)]
            for leaves, mask in zip((others, consts), perturbed, strict=True)
        )

        def differentiable(*floats: Leaves) -> Any:
            some_carry, stack, some_others, some_consts = floats
            result = body(
                _merged(carry_mask, some_carry, carry),
                stack,
                _merged(others_mask, some_others, others),
                _merged(consts_mask, some_consts, consts),
            )
            return tuple([x for x in leaves if _is_float(x)] for leaves in result), result

        _, transpose, (new_carry, y) = jax.vjp(
            differentiable,
            _selected(carry_mask, carry),
            stack,
            _selected(others_mask, others),
            _selected(consts_mask, consts),
            has_aux=True,
        )
        residuals, tree = jax.tree.flatten(transpose)
        self = cls((carry_mask, others_mask, consts_mask), list(map(_is_float, y)), tree)
        # Parameters and arrays that all layers share are not saved: the backward pass has them.
        places = {
            id(x): (i, k)
            for i, leaves in enumerate((stack, others, consts))
            for k, x in enumerate(leaves)
        }
        self._sources = [places.get(id(x)) for x in residuals]
        saved = [x for x, source in zip(residuals, self._sources, strict=True) if source is None]
        return (new_carry, y), saved, self

    def pull(
        self,
        saved: Leaves,
        stack: Leaves,
        others: Leaves,
        consts: Leaves,
        carry_bar: Leaves,
        y_bar: Leaves,
    ) -> tuple[Leaves, Leaves, Leaves, Leaves]:
        """Returns the cotangents of carry, stack, others and constants."""
        present, left = (stack, others, consts), iter(saved)
        residuals = [next(left) if x is None else present[x[0]][x[1]] for x in self._sources]
        return self._tree.unflatten(residuals)((carry_bar, y_bar))

    def cotangents(self, carry_bar: Leaves, y_bar: Leaves) -> tuple[Leaves, Leaves]:
        """Returns the cotangents of the leaves that are differentiated."""
        return (
            list(map(_instantiated, _selected(self._carry, carry_bar))),
            list(map(_instantiated, _selected(self._y, y_bar))),
        )

    def zeros(self, consts: Leaves) -> Leaves:
        """Returns the cotangents of constants before the first layer."""
        return list(map(jnp.zeros_like, _selected(self._consts, consts)))

    def spread(self, carry_bar: Leaves, others_bar: Leaves, consts_bar: Leaves) -> Any:
        """Returns lists of cotangents, with None for leaves that are not differentiated."""
        masks = self._carry, self._others, self._consts
        bars = carry_bar, others_bar, consts_bar
        return tuple(
            _merged(mask, bar, [None] * len(mask)) for mask, bar in zip(masks, bars, strict=True)
        )


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _selected(mask: Sequence[bool], leaves: Leaves) -> Leaves:
    return [x for x, yes in zip(leaves, mask, strict=True) if yes]


def _merged(mask: Sequence[bool], selected: Leaves, leaves: Leaves) -> Leaves:
    """Returns the leaves, with replacements for those that a mask selects."""
    replaced = iter(selected)
    return [next(replaced) if yes else x for x, yes in zip(leaves, mask, strict=True)]


def _instantiated(cotangent: Any) -> Any:
    if not isinstance(cotangent, SymbolicZero):
        return cotangent
    return zeros_of(cotangent.aval)

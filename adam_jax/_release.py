"""Gradient release: each layer's update inside the backward pass."""

# Annotations as text, so that what pickles functions with cloudpickle has no types to pickle.
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import tree_leaves_with_path

from adam_jax._checks import keystr
from adam_jax._layers import Group, Update
from adam_jax._state import node_types, per_leaf
from adam_jax._types import Mask, is_function


def value_and_update(
    loss: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    *,
    layers: Mask,
    has_aux: bool = False,
) -> Callable[..., tuple[Any, optax.Params, optax.OptState]]:
    """Thin."""

    def step(
        params: optax.Params, state: optax.OptState, *args: Any, **kwargs: Any
    ) -> tuple[Any, optax.Params, optax.OptState]:
        step = _Step(optimizer, params, state, layers)
        return step.run(loss, has_aux, args, kwargs)

    return step


class _Step:
    def __init__(self, optimizer: Any, params: Any, state: Any, layers: Mask):
        prefix = layers(params) if is_function(node_types(params), layers) else layers
        self.stacked = per_leaf("layers", prefix, params)
        self.params, self.params_tree = jax.tree.flatten(params)
        self.state, self.state_tree = jax.tree.flatten(state)
        self.update = Update(optimizer, params, state, self.stacked)
        self.guards: dict[int, Any] = {}
        self.new_params = list(self.params)
        self.new_state = list(self.state)
        self.scanned: set[int] = set()
        self.released: set[int] = set()

    def run(self, loss: Any, has_aux: bool, args: Any, kwargs: Any) -> Any:
        free = [i for i, yes in enumerate(self.stacked) if not yes]

        def value(leaves: Any, tick: Any) -> Any:
            self.tick = tick
            tree = list(self.params)
            for i, x in zip(free, leaves, strict=True):
                tree[i] = x
            for i, yes in enumerate(self.stacked):
                if yes:
                    tree[i] = self.guards[i] = _guarded(str(i), tree[i], tick)
            return loss(self.params_tree.unflatten(tree), *args, scan=self.scan, **kwargs)

        result, (gradients, _) = jax.value_and_grad(value, (0, 1), has_aux=has_aux)(
            [self.params[i] for i in free], jnp.zeros(())
        )
        group = Group(
            free, sorted({j for i in free for j in self.update.groups[i].state})
        )
        new_params, new_state, new_shared = self.update.of_rest(group)(
            gradients,
            [self.params[i] for i in free],
            [self.state[j] for j in group.state],
            [self.state[j] for j in self.update.shared],
            [],
        )
        for i, x in zip(group.params, new_params, strict=True):
            self.new_params[i] = x
        for j, x in zip([*group.state, *self.update.shared], [*new_state, *new_shared], strict=True):
            self.new_state[j] = x
        return (
            result,
            self.params_tree.unflatten(self.new_params),
            self.state_tree.unflatten(self.new_state),
        )

    def scan(
        self, f: Any, init: Any, xs: Any = None, length: Any = None, reverse: bool = False,
        unroll: Any = 1,
    ) -> Any:
        leaves, xs_tree = jax.tree.flatten(xs)
        places = {id(guard): i for i, guard in self.guards.items()}
        which = [places.get(id(x)) for x in leaves]
        own = [i for i in which if i is not None]
        if not own:
            return jax.lax.scan(f, init, xs, length, reverse, unroll)
        group = Group(own, sorted({j for i in own for j in self.update.groups[i].state}))
        update = self.update.of_layer(group)
        scan = functools.partial(jax.lax.scan, unroll=unroll)
        others = [x for x, i in zip(leaves, which, strict=True) if i is None]
        size = self.params[own[0]].shape[0]
        shared = [self.state[j] for j in self.update.shared]

        def merged(stack: Any, others: Any) -> Any:
            stack, others = iter(stack), iter(others)
            return xs_tree.unflatten([next(others) if i is None else next(stack)[0] for i in which])

        example = [
            jax.ShapeDtypeStruct((1, *self.params[i].shape[1:]), self.params[i].dtype) for i in own
        ]
        others_like = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in others]
        closed, out_shape = jax.make_jaxpr(
            lambda carry, stack, others: f(carry, merged(stack, others)), return_shape=True
        )(init, example, others_like)
        out_tree = jax.tree.structure(out_shape)

        def body(carry: Any, stack: Any, others: Any, consts: Any) -> Any:
            flat = jax.tree.leaves((carry, stack, others))
            return out_tree.unflatten(jax.core.eval_jaxpr(closed.jaxpr, consts, *flat))

        @jax.custom_vjp
        def whole(tick: Any, init: Any, others: Any, consts: Any) -> Any:
            raise NotImplementedError

        pullback_tree: Any = None

        def forward(tick: Any, init: Any, others: Any, consts: Any) -> Any:
            stack = [self.params[i] for i in own]

            def layer(carry: Any, x: Any) -> Any:
                nonlocal pullback_tree
                stack, others = x
                stack = [p[None] for p in stack]
                out, pullback = jax.vjp(body, carry, stack, others, consts)
                residuals, pullback_tree = jax.tree.flatten(pullback)
                known = {id(p): ("stack", k) for k, p in enumerate(stack)}
                known |= {id(p): ("others", k) for k, p in enumerate(others)}
                known |= {id(p): ("consts", k) for k, p in enumerate(consts)}
                self.kept = [known.get(id(r)) for r in residuals]
                carry, y = out
                saved = [r for r, k in zip(residuals, self.kept, strict=True) if k is None]
                return carry, (y, saved)

            carry, (ys, saved) = scan(layer, init, (stack, others), length, reverse)
            return (carry, ys), (saved, others, consts)

        def backward(residuals: Any, cotangents: Any) -> Any:
            saved, others, consts = residuals
            carry_ct, ys_ct = cotangents

            def layer(carry: Any, x: Any) -> Any:
                stack, state, carry_ct, consts_ct = carry
                k, saved, others, y_ct = x
                one = [jax.lax.dynamic_slice_in_dim(p, k, 1) for p in stack]
                one_state = [jax.lax.dynamic_slice_in_dim(p, k, 1) for p in state]
                sources = {"stack": one, "others": others, "consts": consts}
                saved = iter(saved)
                pullback = pullback_tree.unflatten(
                    [next(saved) if w is None else sources[w[0]][w[1]] for w in self.kept]
                )
                carry_ct, gradients, others_ct, ct = pullback((carry_ct, y_ct))
                new, new_state, _ = update(gradients, one, one_state, shared, [k[None]])
                write = lambda p, x: jax.lax.dynamic_update_slice_in_dim(p, x, k, 0)  # noqa: E731
                stack = list(map(write, stack, new))
                state = list(map(write, state, new_state))
                consts_ct = jax.tree.map(jnp.add, consts_ct, ct)
                return (stack, state, carry_ct, consts_ct), others_ct

            zeros = jax.tree.map(jnp.zeros_like, consts)
            start = (
                [self.params[i] for i in own],
                [self.state[j] for j in group.state],
                carry_ct,
                zeros,
            )
            xs = (jnp.arange(size), saved, others, ys_ct)
            (stack, state, carry_ct, consts_ct), others_ct = scan(
                layer, start, xs, reverse=not reverse
            )
            for i, x in zip(group.params, stack, strict=True):
                self.new_params[i] = x
            for j, x in zip(group.state, state, strict=True):
                self.new_state[j] = x
            return None, carry_ct, others_ct, consts_ct

        whole.defvjp(forward, backward)
        return whole(self.tick, init, others, closed.consts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _guarded(path: str, leaf: Any, tick: Any) -> Any:
    return leaf


def _guard_forward(path: str, leaf: Any, tick: Any) -> Any:
    return leaf, None


def _guard_backward(path: str, _: Any, cotangent: Any) -> Any:
    raise ValueError(f"{path} needs a gradient outside of scan")


_guarded.defvjp(_guard_forward, _guard_backward)

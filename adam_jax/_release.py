"""Implements gradient release: each layer is updated as soon as its gradient is computed."""

# Annotations stay text: cloudpickle then has no types to pickle along with a function.
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental.layout import Layout, with_layout_constraint

from adam_jax._backward import Backward
from adam_jax._clipping import sum_of_squares
from adam_jax._layers import Group, Updates
from adam_jax._offload import leaf_by_leaf
from adam_jax._scan import Leaves, one_layer
from adam_jax._sharding import barrier, fetched, in_host, in_memory_of
from adam_jax._state import mask_per_leaf
from adam_jax._types import Mask

Step = Callable[..., tuple[Any, optax.Params, optax.OptState]]


def value_and_update(
    loss: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    *,
    layers: Mask,
    has_aux: bool = False,
) -> Step:
    """Makes a training step with gradient release, which holds one layer's gradients at a time.

    A step with `jax.value_and_grad` computes all gradients and then the update. If layers are
    stacked and go through `jax.lax.scan`, the gradients of all layers take as much memory as the
    parameters. This step updates each layer as soon as the backward pass has its gradient, and then
    drops the gradient. With bfloat16 parameters, int8 moments and an int8 remainder it takes 5
    bytes per parameter instead of 7; in float32 12 instead of 16. Unrolled layers do not need it,
    because XLA frees each of their gradients by itself.

        def loss(params, batch, scan=jax.lax.scan):
            x = params["embed"][batch]
            x, _ = scan(block, x, params["blocks"])
            return jnp.mean(cross_entropy(x @ params["head"], batch))

        layers = {"embed": False, "blocks": True, "head": False}
        step = adam_jax.value_and_update(loss, optimizer, layers=layers)
        step = jax.jit(step, donate_argnums=(0, 1))
        value, params, state = step(params, state, batch)

    The step computes the same numbers as the plain step: each layer's gradient goes through the
    optimizer's own `update` and `optax.apply_updates`. The state is that of
    `optimizer.init(params)`, so one run can alternate between both steps. The forward pass saves,
    and the backward pass recomputes, the same as with `jax.lax.scan`: put `jax.checkpoint` around
    the block as usual.

    The update of a layer must not depend on other layers or leaves, whose gradients are not in
    memory. The step checks that when it is traced, on the operations of the optimizer. To clip, use
    `per_layer` or `clip_by_global_norm`; the latter costs a second backward pass. Gradient release
    is due to [Pudipeddi et al. (2020)](https://arxiv.org/abs/2002.05645) and
    [Lv et al. (2023)](https://arxiv.org/abs/2306.09782).

    Args:
        loss: `loss(params, *args, scan=..., **kwargs)` returns a scalar, or with `has_aux` a scalar
            and a tree. It calls `scan`, which has the signature of `jax.lax.scan`, with the stacked
            parameters themselves among the leaves of `xs`; cast or reshape them in the body. Each
            goes through one scan. Other uses are possible where no gradient is needed.
        optimizer: any optax gradient transformation that works leaf by leaf and layer by layer.
        layers: which parameters are stacked over layers, along their first axis, and go through
            `scan`: a tree of bools that is a prefix of the parameter tree, or a function from the
            parameters to one.
        has_aux: whether the loss returns a tree as well as its value.

    Returns:
        `step(params, state, *args, **kwargs)`, which returns the loss (or the loss and the tree),
        the new parameters and the new state. Jit it, and donate parameters and state.

    Raises:
        ValueError: in the step, when it is traced: for an optimizer that mixes layers or leaves, or
            treats stacks of different lengths differently; for a stacked parameter that is not
            scanned, is scanned twice or inside another transformation, does not affect the loss, or
            needs a gradient elsewhere. The message names the parameter.
        TypeError: for a leaf of `layers` that is no bool.

    Examples:
        >>> import adam_jax, jax, jax.numpy as jnp
        >>> def loss(params, x, scan=jax.lax.scan):
        ...     x, _ = scan(lambda x, w: (jnp.tanh(w * x), None), x, params["layers"])
        ...     return jnp.sum((x - params["bias"]) ** 2)
        >>> params = {"layers": jnp.ones((8, 4)), "bias": jnp.zeros(4)}
        >>> optimizer = adam_jax.adam(0.1)
        >>> layers = {"layers": True, "bias": False}
        >>> step = jax.jit(adam_jax.value_and_update(loss, optimizer, layers=layers))
        >>> value, params, state = step(params, optimizer.init(params), jnp.ones(4))
        >>> print(f"{params['layers'][0, 0]:.3f}")
        0.900
    """

    def step(
        params: optax.Params, state: optax.OptState, *args: Any, **kwargs: Any
    ) -> tuple[Any, optax.Params, optax.OptState]:
        stacked = mask_per_leaf("layers", layers, params)
        backward = Backward(loss, params, stacked, has_aux)
        updates = Updates(optimizer, params, state, stacked)
        rest = updates.group(backward.rest)
        norm = None
        if updates.needs_norm:
            squares: Leaves = []
            _, gradients = backward(lambda places: _Squares(squares), *args, **kwargs)
            norm = jnp.sqrt(sum([*squares, *map(sum_of_squares, gradients)]))
        leaves, tree = jax.tree.flatten(params)
        new = _New(list(leaves), jax.tree.leaves(state))
        release = lambda places: _Release(updates, places, new, norm)  # noqa: E731
        result, gradients = backward(release, *args, **kwargs)
        rest_state = [new.state[j] for j in rest.state]
        update = updates.of_rest(rest, norm)
        if any(map(in_host, rest_state)):
            update = _leaf_by_leaf(update, len(updates.shared))
        rest_params = [leaves[i] for i in rest.params]
        new_params, new_state, shared = update(gradients, rest_params, rest_state)
        new.put(rest, new_params, new_state)
        new.put(Group([], updates.shared), [], shared)
        return result, tree.unflatten(new.params), jax.tree.structure(state).unflatten(new.state)

    return step


class _New:
    """The new parameters and state, filled in leaf by leaf."""

    def __init__(self, params: Leaves, state: Leaves):
        self.params = params
        self.state = state

    def put(self, group: Group, params: Leaves, state: Leaves) -> None:
        """Stores the leaves of a group."""
        for i, x in zip(group.params, params, strict=True):
            self.params[i] = x
        for j, x in zip(group.state, state, strict=True):
            self.state[j] = x


class _Release:
    """Updates each layer with its gradient: the consumer of a scan."""

    def __init__(self, updates: Updates, places: list[int], new: _New, norm: Any):
        self._group = updates.group(places)
        self._update = updates.of_layer(self._group, norm)
        self._new = new

    def begin(self, params: Leaves) -> tuple[Leaves, Leaves]:
        """Returns the parameters and the state of all layers."""
        return params, [self._new.state[j] for j in self._group.state]

    def params(self, carry: tuple[Leaves, Leaves], place: jax.Array) -> Leaves:
        """Returns one layer's parameters."""
        return one_layer(carry[0], place)

    def consume(
        self, carry: tuple[Leaves, Leaves], place: jax.Array, gradients: Leaves, rest: Any
    ) -> tuple[tuple[Leaves, Leaves], Any]:
        """Returns the stacks with one layer updated."""

        def updated(carry: Any, place: jax.Array, gradients: Leaves, rest: Any) -> Any:
            params, state = _fetched_layer(carry, place)
            return self._update(gradients, params, state, place), rest

        new, rest = _before_it_is_written(updated, carry, place, gradients, rest)

        def write(x: Any, layer: Any) -> Any:
            return jax.lax.dynamic_update_slice_in_dim(x, in_memory_of(x, layer), place, 0)

        return jax.tree.map(write, carry, tuple(new)), rest

    def end(self, carry: tuple[Leaves, Leaves]) -> None:
        """Stores the stacks."""
        self._new.put(self._group, *carry)


def _leaf_by_leaf(update: Any, shared: int) -> Any:
    """Returns an update that fetches its state from host memory one leaf at a time."""

    def fetching(gradients: Leaves, params: Leaves, state: Leaves) -> tuple[Leaves, Leaves, Leaves]:
        size = len(params)

        def flat(*leaves: Any) -> Leaves:
            new_params, new_state, others = update(
                leaves[:size], leaves[size : 2 * size], leaves[2 * size :]
            )
            return [*others, *new_params, *new_state]

        over = {shared + i: size + i for i in range(size)}
        result = leaf_by_leaf(flat, [*gradients, *params], state, over)
        end = shared + size
        return result[shared:end], result[end:], result[:shared]

    return fetching


def _fetched_layer(stacks: Any, place: jax.Array) -> Any:
    """Returns a layer of each stack in device memory, of shape (1, ...)."""
    return fetched(one_layer(stacks, place))


class _Squares:
    """Adds up the squares of gradients: the consumer of a scan that needs only the norm."""

    def __init__(self, squares: Leaves):
        self._squares = squares

    def begin(self, params: Leaves) -> tuple[Leaves, jax.Array]:
        """Returns the parameters of all layers, and 0."""
        return params, jnp.zeros((), jnp.float32)

    def params(self, carry: tuple[Leaves, jax.Array], place: jax.Array) -> Leaves:
        """Returns one layer's parameters."""
        return one_layer(carry[0], place)

    def consume(
        self, carry: tuple[Leaves, jax.Array], place: jax.Array, gradients: Leaves, rest: Any
    ) -> tuple[tuple[Leaves, jax.Array], Any]:
        """Returns the sum with one layer's squares."""
        return (carry[0], sum(map(sum_of_squares, gradients), start=carry[1])), rest

    def end(self, carry: tuple[Leaves, jax.Array]) -> None:
        """Stores the sum."""
        self._squares.append(carry[1])


def _before_it_is_written(
    updated: Any, stacks: Any, place: jax.Array, gradients: Leaves, rest: Any
) -> Any:
    """Returns the updated layer and the rest, computed before any of their inputs is overwritten.

    If all operations could be fused and reordered freely, XLA for CPU would copy whole stacks, and
    XLA for GPU would store the words and then compute each output from them again.
    """
    updated = jax.jit(updated)  # traced once for all platforms

    def on_cpu(*operands: Any) -> Any:
        # The condition always holds, but the compiler does not know that.
        return jax.lax.cond(place >= 0, updated, nothing, *operands)

    def nothing(stacks: Any, place: jax.Array, gradients: Leaves, rest: Any) -> Any:
        return _fetched_layer(stacks, place), jax.tree.map(jnp.zeros_like, rest)

    def on_tpu(*operands: Any) -> Any:
        new, rest = barrier(updated(*operands))
        as_stacks = lambda x: with_layout_constraint(x, Layout(tuple(range(x.ndim))))  # noqa: E731
        return jax.tree.map(as_stacks, new), rest

    return jax.lax.platform_dependent(
        stacks,
        place,
        gradients,
        rest,
        cpu=on_cpu,
        tpu=on_tpu,
        default=lambda *operands: barrier(updated(*operands)),
    )

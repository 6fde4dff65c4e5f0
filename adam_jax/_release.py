"""Gradient release: each layer's update as soon as the backward pass has its gradient."""

# Annotations as text, so that what pickles functions with cloudpickle has no types to pickle.
from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import optax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.extend import core

from adam_jax._checks import keystr
from adam_jax._clipping import sum_of_squares
from adam_jax._layers import Group, Updates
from adam_jax._offload import leaf_by_leaf
from adam_jax._scan import Leaves, one_layer, scan_layers
from adam_jax._sharding import barrier, fetched, in_host, in_memory_of
from adam_jax._state import mask_per_leaf
from adam_jax._types import Mask

Step = Callable[..., tuple[Any, optax.Params, optax.OptState]]

# Moved in JAX 0.10.
_trace_state = getattr(core, "get_opaque_trace_state", None) or jax.core.get_opaque_trace_state


def value_and_update(
    loss: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    *,
    layers: Mask,
    has_aux: bool = False,
) -> Step:
    """Makes a training step with gradient release: it holds one layer's gradients at a time.

    A step with `jax.value_and_grad` first has all gradients and then makes the update. Where layers
    are stacked and go through `jax.lax.scan`, the gradients of all of them are one more copy of the
    parameters. This step updates each layer as soon as the backward pass has its gradient, which
    nobody needs any more then. With bfloat16 parameters, int8 moments and an int8 remainder it
    takes 5 bytes per parameter instead of 7; in float32 12 instead of 16. Unrolled layers need none
    of this: there XLA frees each gradient by itself.

        def loss(params, batch, scan=jax.lax.scan):
            x = params["embed"][batch]
            x, _ = scan(block, x, params["blocks"])
            return jnp.mean(cross_entropy(x @ params["head"], batch))

        layers = {"embed": False, "blocks": True, "head": False}
        step = adam_jax.value_and_update(loss, optimizer, layers=layers)
        step = jax.jit(step, donate_argnums=(0, 1))
        value, params, state = step(params, state, batch)

    The numbers are those of the plain step: each layer's gradient goes through the optimizer's own
    `update` and `optax.apply_updates`. The state is the one of `optimizer.init(params)`, so that
    one run can use both steps in turn. What the forward pass saves and what the backward pass
    computes again is as with `jax.lax.scan`: put `jax.checkpoint` around the block as usual.

    The update of a layer must not depend on other layers or leaves, whose gradients are not there.
    That is determined from what the optimizer computes, when the step is traced. `per_layer` and
    `clip_by_global_norm` are for clipping; the latter costs a second backward pass. Gradient
    release is due to [Pudipeddi et al. (2020)](https://arxiv.org/abs/2002.05645) and
    [Lv et al. (2023)](https://arxiv.org/abs/2306.09782).

    Args:
        loss: `loss(params, *args, scan=..., **kwargs)` returns a scalar, or a scalar and a tree
            with `has_aux`. It calls `scan`, which has the signature of `jax.lax.scan`, with stacked
            parameters among the leaves of `xs`, as they are: whatever else happens to them happens
            in the scan's body. Each goes through one scan. They may be read elsewhere, where no
            gradient is needed.
        optimizer: any optax gradient transformation that works leaf by leaf and layer by layer.
        layers: which parameters are stacked over layers, along their first axis, and go through
            `scan`: a tree of bools that is a prefix of the parameter tree, or a function from the
            parameters to one.
        has_aux: whether the loss returns a tree beside its value.

    Returns:
        `step(params, state, *args, **kwargs)`, which returns the loss (or the loss and the tree),
        new parameters and the new state. Jit it, and donate parameters and state.

    Raises:
        ValueError: in the step, when it is traced: for an optimizer that joins layers or leaves, or
            treats stacks of different lengths differently; for a stacked parameter that is not
            scanned, scanned more than once, inside another transformation, or in vain, or that
            needs a gradient elsewhere. Parameters are named.
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
        >>> params["layers"][0]
        Array([0.9, 0.9, 0.9, 0.9], dtype=float32)
    """

    def step(
        params: optax.Params, state: optax.OptState, *args: Any, **kwargs: Any
    ) -> tuple[Any, optax.Params, optax.OptState]:
        stacked = mask_per_leaf("layers", layers, params)
        leaves, tree = jax.tree.flatten(params)
        paths = [keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        _check_stacked(paths, leaves, stacked)
        updates = Updates(optimizer, params, state, stacked)
        rest = updates.group([i for i, yes in enumerate(stacked) if not yes])

        def backward(consumer: Callable[[list[int]], Any]) -> tuple[Any, Leaves]:
            """Returns the loss, and the gradients of leaves that are not stacked."""
            scans = _Scans(paths, leaves, stacked, consumer)

            def value(rest_leaves: Leaves, tick: jax.Array) -> Any:
                filled = scans.begin(tick) | dict(zip(rest.params, rest_leaves, strict=True))
                params = tree.unflatten([filled[i] for i in range(len(leaves))])
                return loss(params, *args, scan=scans.scan, **kwargs)

            differentiated = jax.value_and_grad(value, argnums=(0, 1), has_aux=has_aux)
            result, (gradients, _) = differentiated(
                [leaves[i] for i in rest.params], jnp.zeros((), jnp.float32)
            )
            scans.check()
            return result, gradients

        norm = None
        if updates.needs_norm:
            squares: Leaves = []
            _, gradients = backward(lambda places: _Squares(squares))
            norm = jnp.sqrt(sum([*squares, *map(sum_of_squares, gradients)]))
        new = _New(list(leaves), jax.tree.leaves(state))
        result, gradients = backward(lambda places: _Release(updates, places, new, norm))
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


def _check_stacked(paths: Sequence[str], leaves: Leaves, stacked: Sequence[Any]) -> None:
    for path, leaf, yes in zip(paths, leaves, stacked, strict=True):
        if not isinstance(yes, bool):
            raise TypeError(
                f"layers has {yes!r} at {path}. It says of whole leaves whether they are stacked "
                "over layers: pass True or False."
            )
        if yes and jnp.ndim(leaf) == 0:
            raise ValueError(f"layers is True at {path}, which is a scalar and no stack.")
    if not any(stacked):
        raise ValueError(
            "layers is False for all parameters: pass True for those that are stacked over layers "
            "and go through scan, or take the plain step."
        )


class _New:
    """New parameters and state, leaf by leaf as they are made."""

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
    """Returns an update that fetches one leaf's state at a time from host memory."""

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
    """Adds up the squares of gradients: the consumer of a scan whose norm alone is wanted."""

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
    """Returns a layer of stacks, updated, and the rest, before anything of it is overwritten.

    With all operations free to be fused and put in any order, XLA for CPU copies whole stacks, and
    XLA for GPU writes the words from which it then makes each output anew.
    """
    updated = jax.jit(updated)  # traced once for all platforms

    def on_cpu(*operands: Any) -> Any:
        # A condition that always holds, which the compiler does not know.
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


class _Scans:
    """The scans of one backward pass: which parameters went through one, and whether all did."""

    def __init__(
        self,
        paths: Sequence[str],
        leaves: Leaves,
        stacked: Sequence[bool],
        consumer: Callable[[list[int]], Any],
    ):
        self._paths = paths
        self._leaves = leaves
        self._stacked = stacked
        self._consumer = consumer
        self._guarded: dict[int, Any] = {}
        self._scanned: set[int] = set()
        self._consumed: set[int] = set()
        self._tick: Any = None
        self._trace: Any = None

    def begin(self, tick: jax.Array) -> dict[int, Any]:
        """Returns the stacks to give to the loss, which must not be differentiated elsewhere."""
        self._tick = tick
        self._trace = _trace_state()
        self._guarded = {
            i: _guarded(self._paths[i], leaf, tick)
            for i, leaf in enumerate(self._leaves)
            if self._stacked[i]
        }
        return self._guarded

    def scan(
        self,
        f: Callable[[Any, Any], tuple[Any, Any]],
        init: Any,
        xs: Any = None,
        length: int | None = None,
        reverse: bool = False,
        unroll: int | bool = 1,
    ) -> tuple[Any, Any]:
        """Like `jax.lax.scan`, but hands on the gradients of stacks among the leaves of xs."""
        places = {id(x): i for i, x in self._guarded.items()}
        leaves, tree = jax.tree.flatten(xs)
        found = [places.get(id(x)) for x in leaves]
        own = [i for i in found if i is not None]
        if not own:
            return jax.lax.scan(f, init, xs, length, reverse, unroll)
        self._check_scan(own)
        self._scanned.update(own)
        raw = [x if i is None else self._leaves[i] for x, i in zip(leaves, found, strict=True)]
        consumer = self._consumer(own)

        def end(carry: Any) -> None:
            self._consumed.update(own)
            consumer.end(carry)

        return scan_layers(
            f,
            init,
            tree.unflatten(raw),
            length,
            reverse,
            unroll,
            stacked=[i is not None for i in found],
            consumer=consumer,
            end=end,
            tick=self._tick,
        )

    def _check_scan(self, own: list[int]) -> None:
        names = ", ".join(self._paths[i] for i in own)
        if _trace_state() != self._trace:
            raise ValueError(
                f"scan over {names} is called inside a function that is transformed, by jax.jit, "
                "jax.checkpoint, jax.lax.cond or another scan. Call it in the loss itself, once."
            )
        for i in own:
            if i in self._scanned or own.count(i) > 1:
                raise ValueError(
                    f"parameter {self._paths[i]} is scanned twice, but has its update after the "
                    "first backward pass. Leave it out of layers: pass False for it."
                )

    def check(self) -> None:
        """Raises ValueError unless each stack had its gradients consumed."""
        for i, path in enumerate(self._paths):
            if self._stacked[i] and i not in self._scanned:
                raise ValueError(
                    f"parameter {path} is marked in layers but is not among the xs of scan as it "
                    "is. Scan over it in the loss, with the function scan that it is given, and "
                    "cast or reshape a layer inside the scan's body; or pass False for it."
                )
            if self._stacked[i] and i not in self._consumed:
                raise ValueError(
                    f"the loss does not depend on what scan returns for parameter {path}, which "
                    "has no gradient then. Pass False for it in layers."
                )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _guarded(path: str, leaf: jax.Array, tick: jax.Array) -> jax.Array:
    """Returns the leaf, which needs a gradient since `tick` is differentiated."""
    return leaf


def _guard_forward(path: str, leaf: jax.Array, tick: jax.Array) -> tuple[jax.Array, None]:
    return leaf, None


def _guard_backward(path: str, residuals: None, cotangent: Any) -> Any:
    raise ValueError(
        f"parameter {path} is marked in layers, and the loss needs a gradient of it outside of the "
        "scan over it. Cast or reshape a layer inside the scan's body; of what needs no gradient "
        "take jax.lax.stop_gradient. Or pass False for it in layers."
    )


_guarded.defvjp(_guard_forward, _guard_backward)

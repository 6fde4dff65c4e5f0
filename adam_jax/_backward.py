"""Runs the backward pass of a loss with stacked layers; a consumer gets each layer's gradients."""

# Annotations stay text: cloudpickle then has no types to pickle along with a function.
from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.extend import core

from adam_jax._checks import keystr
from adam_jax._scan import Consumer, Leaves, scan_layers

# Moved in JAX 0.10.
_trace_state = getattr(core, "get_opaque_trace_state", None) or jax.core.get_opaque_trace_state


class Backward:
    """Differentiates a loss, some of whose parameters are stacked over layers.

    Attributes:
        rest: the places of the leaves that are not stacked.
    """

    def __init__(
        self, loss: Callable[..., Any], params: Any, stacked: Sequence[Any], has_aux: bool
    ):
        self._loss = loss
        self._leaves, self._tree = jax.tree.flatten(params)
        self._paths = [keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        self._stacked = stacked
        self._has_aux = has_aux
        _check_stacked(self._paths, self._leaves, stacked)
        self.rest = [i for i, yes in enumerate(stacked) if not yes]

    def __call__(
        self, consumer: Callable[[list[int]], Consumer], *args: Any, **kwargs: Any
    ) -> tuple[Any, Leaves]:
        """Returns the loss, and the gradients of the leaves that are not stacked.

        `consumer` gets the places of the stacks of one scan, and returns the consumer of their
        gradients.
        """
        scans = _Scans(self._paths, self._leaves, self._stacked, consumer)

        def value(rest: Leaves, tick: jax.Array) -> Any:
            filled = scans.begin(tick) | dict(zip(self.rest, rest, strict=True))
            params = self._tree.unflatten([filled[i] for i in range(len(self._leaves))])
            return self._loss(params, *args, scan=scans.scan, **kwargs)

        differentiated = jax.value_and_grad(value, argnums=(0, 1), has_aux=self._has_aux)
        rest = [self._leaves[i] for i in self.rest]
        result, (gradients, _) = differentiated(rest, jnp.zeros((), jnp.float32))
        scans.check()
        return result, gradients


def check_layers(paths: Sequence[str], layers: Sequence[Any]) -> None:
    """Raises TypeError unless the value of `layers` for each leaf is a bool."""
    for path, yes in zip(paths, layers, strict=True):
        if not isinstance(yes, bool):
            raise TypeError(
                f"layers has {yes!r} at {path}. It marks whole leaves as stacked over layers: pass "
                "True or False for each."
            )


def _check_stacked(paths: Sequence[str], leaves: Leaves, stacked: Sequence[Any]) -> None:
    check_layers(paths, stacked)
    for path, leaf, yes in zip(paths, leaves, stacked, strict=True):
        if yes and jnp.ndim(leaf) == 0:
            raise ValueError(
                f"layers is True at {path}, which is a scalar and no stack. Pass False for it."
            )
    if not any(stacked):
        raise ValueError(
            "layers is False for all parameters: pass True for those that are stacked over layers "
            "and go through scan, or use the plain step."
        )


class _Scans:
    """The scans of one backward pass, which records the parameters that went through a scan."""

    def __init__(
        self,
        paths: Sequence[str],
        leaves: Leaves,
        stacked: Sequence[bool],
        consumer: Callable[[list[int]], Consumer],
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
        """Returns the stacks for the loss, guarded against differentiation outside of a scan."""
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
        """Calls `jax.lax.scan`, or a scan that passes on the gradients of the stacks among xs."""
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
                    f"parameter {self._paths[i]} is scanned twice, but its gradient has to be "
                    "complete after one scan. Leave it out of layers: pass False for it."
                )

    def check(self) -> None:
        """Raises ValueError unless the gradients of each stack were consumed."""
        for i, path in enumerate(self._paths):
            if self._stacked[i] and i not in self._scanned:
                raise ValueError(
                    f"parameter {path} is marked in layers but is not among the xs of scan. Scan "
                    "over the parameter itself, with the loss's argument scan, and cast or reshape "
                    "a layer inside the scan's body; or pass False for it."
                )
            if self._stacked[i] and i not in self._consumed:
                raise ValueError(
                    f"the loss does not depend on the results of scan over parameter {path}, which "
                    "therefore has no gradient. Pass False for it in layers."
                )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _guarded(path: str, leaf: jax.Array, tick: jax.Array) -> jax.Array:
    """Returns the leaf, which needs a gradient because `tick` is differentiated."""
    return leaf


def _guard_forward(path: str, leaf: jax.Array, tick: jax.Array) -> tuple[jax.Array, None]:
    return leaf, None


def _guard_backward(path: str, residuals: None, cotangent: Any) -> Any:
    raise ValueError(
        f"parameter {path} is marked in layers, but the loss needs a gradient of it outside of the "
        "scan over it. Cast or reshape a layer inside the scan's body, and use "
        "jax.lax.stop_gradient where no gradient is needed. Or pass False for it in layers."
    )


_guarded.defvjp(_guard_forward, _guard_backward)

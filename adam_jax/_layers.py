"""Extracts from any optimizer the update of one layer of stacked parameters.

The update of the whole tree is traced twice: with all layers, and with one layer of each stack. The
first trace shows which leaves depend on each other. The second, without the operations that a stack
does not need, is the update of a layer. It equals that of the whole tree if both traces consist of
the same operations and none of these mixes layers.
"""

# Annotations stay text: cloudpickle then has no types to pickle along with a function.
from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import eval_jaxpr
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.interpreters import partial_eval

from adam_jax._checks import keystr
from adam_jax._sharding import device_type, divides_layers
from adam_jax._state import with_extra_args

_REMEDY = (
    "Gradient release never has all gradients at once. Clip each layer by itself with "
    "adam_jax.per_layer, or by the norm of all gradients with adam_jax.clip_by_global_norm; for "
    "anything else use the plain step."
)


class Group(NamedTuple):
    """Leaves that are updated together, by their places in the trees of parameters and state."""

    params: list[int]
    state: list[int]


class Updates:
    """An optimizer's update of parameters and state, leaf by leaf and layer by layer.

    Attributes:
        shared: the places in the state of leaves that depend on no gradient, such as the count.
        needs_norm: whether the optimizer needs the norm of all gradients.
    """

    def __init__(
        self,
        optimizer: optax.GradientTransformation,
        params: optax.Params,
        state: optax.OptState,
        stacked: Sequence[bool],
    ):
        self._update = with_extra_args(optimizer).update
        self._params, self._params_tree = jax.tree.flatten(params)
        self._state, self._state_tree = jax.tree.flatten(state)
        self._stacked = stacked
        self._lengths = sorted({self._params[i].shape[0] for i in self._stacks()})
        self._paths, self._state_paths = (
            [keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
            for tree in (params, state)
        )
        self._unused: list[int] = []
        self._whole = self._traced(self._params, self._state)
        self._groups, self.shared, self.needs_norm = self._dependences()
        for i in self._stacks():
            self._check_group(i)
        layered = {j for i in self._stacks() for j in self._groups[i].state}
        # Placeholders that nothing depends on: for one layer they would have one element too.
        layered |= {
            j for j in self._unused if self._state[j].shape[:1] in [(n,) for n in self._lengths]
        }
        one_layer = functools.partial(jax.eval_shape, lambda x: jax.lax.slice_in_dim(x, 0, 1))
        params_of_one = [
            one_layer(x) if yes else x for x, yes in zip(self._params, stacked, strict=True)
        ]
        state_of_one = [one_layer(x) if j in layered else x for j, x in enumerate(self._state)]
        try:
            self._one = self._traced(params_of_one, state_of_one)
        except Exception as error:
            raise ValueError(
                f"the optimizer cannot update one layer alone: {error} {_REMEDY}"
            ) from error
        for i in self._stacks():
            self._check_operations(i)

    def group(self, params: Sequence[int]) -> Group:
        """Returns these parameters with their leaves of the state.

        Raises ValueError if other parameters would have to be updated with them.
        """
        for i in params:
            for other in self._groups[i].params:
                if other not in params:
                    raise self._coupled(i, other)
        return Group(list(params), sorted({j for i in params for j in self._groups[i].state}))

    def of_rest(
        self, group: Group, norm: Any
    ) -> Callable[..., tuple[list[Any], list[Any], list[Any]]]:
        """Returns a function of gradients, parameters and state of leaves that are not stacked.

        It returns new parameters, new state, and the new shared leaves.
        """
        run = self._part(self._whole, group, self.shared)
        size = len(group.state)
        positions = [jnp.arange(n, dtype=jnp.int32) for n in self._lengths]

        def of_rest(
            gradients: list[Any], params: list[Any], state: list[Any]
        ) -> tuple[list[Any], list[Any], list[Any]]:
            params, state = run(gradients, params, state, norm, positions)
            return params, state[:size], state[size:]

        return of_rest

    def of_layer(self, group: Group, norm: Any) -> Callable[..., tuple[list[Any], list[Any]]]:
        """Returns a function of one layer's gradients, parameters, state and place."""
        run = self._part(self._one, group, [])

        def of_layer(
            gradients: list[Any], params: list[Any], state: list[Any], place: jax.Array
        ) -> tuple[list[Any], list[Any]]:
            return run(gradients, params, state, norm, [place[None]])

        return of_layer

    def _traced(self, params: Sequence[Any], state: Sequence[Any]) -> ClosedJaxpr:
        """Returns the jaxpr of (gradients, params, state, norm, positions) to (params, state)."""

        def update(gradients: Any, params: Any, state: Any, norm: Any, positions: Any) -> Any:
            gradients, params = map(self._params_tree.unflatten, (gradients, params))
            updates, new_state = self._update(
                gradients,
                self._state_tree.unflatten(state),
                params,
                positions=positions,
                global_norm=norm,
            )
            new_params = optax.apply_updates(params, updates)
            if jax.tree.structure(new_state) != self._state_tree:
                raise ValueError(
                    "update changes the structure of the optimizer's state, which gradient release "
                    "updates in place. Use the plain step."
                )
            return jax.tree.leaves((new_params, new_state))

        lengths = {x.shape[0] for x, yes in zip(params, self._stacked, strict=True) if yes}
        positions = [jax.ShapeDtypeStruct((n,), jnp.int32) for n in sorted(lengths)]
        norm = jax.ShapeDtypeStruct((), jnp.float32)
        types = list(map(device_type, state))
        return jax.make_jaxpr(update)(list(params), list(params), types, norm, positions)

    def _stacks(self) -> list[int]:
        return [i for i, yes in enumerate(self._stacked) if yes]

    def _dependences(self) -> tuple[list[Group], list[int], bool]:
        """Returns each parameter's group, the shared leaves, and whether the norm is needed."""
        params, states = len(self._params), len(self._state)
        leaf = [1 << k for k in range(params + states)]
        norm = 1 << params + states
        others = len(self._whole.jaxpr.invars) - 2 * params - states - 1
        found = sources(self._whole.jaxpr, [*leaf[:params], *leaf, norm, *[0] * others])
        # The state's leaves that depend on no gradient and no parameter, in any number of steps.
        own = (1 << params) - 1
        shared = set(range(params, params + states))
        while depend := {k for k in shared if found[k] & own}:
            shared -= depend
            own |= sum(map(leaf.__getitem__, depend))
        groups: list[int] = []
        for k, bits in enumerate(found):
            if k not in shared:
                bits = (bits | leaf[k]) & own
                joint = [x for x in groups if x & bits]
                groups = [x for x in groups if not x & bits]
                groups.append(functools.reduce(int.__or__, joint, bits))
        # A leaf that only stacks use, and that has their number of layers, is stacked too.
        for k in sorted(shared):
            users = [g for g in groups if any(found[m] & leaf[k] for m in _bits(g))]
            shape = self._state[k - params].shape
            if not users:
                self._unused.append(k - params)
            elif all(shape[:1] == self._length(g) for g in users):
                groups = [g for g in groups if g not in users]
                groups.append(functools.reduce(int.__or__, users, leaf[k]))
                shared.remove(k)
        by_param: dict[int, Group] = {}
        for bits in groups:
            places = list(_bits(bits))
            group = Group(
                [k for k in places if k < params], [k - params for k in places if k >= params]
            )
            by_param |= dict.fromkeys(group.params, group)
        needs_norm = any(bits & norm for bits in found)
        return (
            [by_param[i] for i in range(params)],
            [k - params for k in sorted(shared)],
            needs_norm,
        )

    def _length(self, group: int) -> tuple[int] | None:
        """Returns the number of layers of a group of stacks."""
        places = [k for k in _bits(group) if k < len(self._params)]
        lengths = {self._params[k].shape[0] if self._stacked[k] else None for k in places}
        [length] = lengths if len(lengths) == 1 else [None]
        return None if length is None else (length,)

    def _coupled(self, i: int, other: int) -> ValueError:
        return ValueError(
            f"the optimizer's update of {self._paths[i]} depends on {self._paths[other]}, which is "
            f"updated at another time. {_REMEDY}"
        )

    def _check_group(self, i: int) -> None:
        """Raises ValueError if a stack depends on something that is not stacked alike."""
        group = self._groups[i]
        length = self._params[i].shape[0]
        for other in group.params:
            if not self._stacked[other] or self._params[other].shape[0] != length:
                raise self._coupled(i, other)
        for j in group.state:
            if divides_layers(self._state[j]):
                raise ValueError(
                    f"state{self._state_paths[j]} is divided among devices along its layers. Pass "
                    "layers to adam_jax.state_shardings, too."
                )
            if self._state[j].shape[:1] != (length,):
                raise ValueError(
                    f"state{self._state_paths[j]} has shape {self._state[j].shape} and no axis of "
                    f"layers, but depends on the gradient of {self._paths[i]}. {_REMEDY}"
                )

    def _check_operations(self, i: int) -> None:
        """Raises ValueError unless each layer of a stack is updated as if it were alone."""
        wanted = self._places(self._groups[i])
        whole, _ = needed(self._whole.jaxpr, wanted)
        one, _ = needed(self._one.jaxpr, wanted)
        try:
            _compare(whole, one, set(self._lengths))
        except _LayersMixedError as error:
            raise ValueError(
                f"the optimizer's update of a layer of {self._paths[i]} {error}. {_REMEDY}"
            ) from None

    def _places(self, group: Group, shared: Sequence[int] = ()) -> list[int]:
        """Returns the places of a group's leaves among the outputs."""
        size = len(self._params)
        return [*group.params, *(size + j for j in (*group.state, *shared))]

    def _part(self, traced: ClosedJaxpr, group: Group, shared: Sequence[int]) -> Any:
        size = len(self._params)
        wanted = self._places(group, shared)
        jaxpr, used = needed(traced.jaxpr, wanted)
        known = {2 * size + j: self._state[j] for j in self.shared}

        def run(gradients: Any, params: Any, state: Any, norm: Any, positions: Any) -> Any:
            values = dict(known)
            values |= dict(zip(group.params, gradients, strict=True))
            values |= dict(zip((size + i for i in group.params), params, strict=True))
            values |= dict(zip((2 * size + j for j in group.state), state, strict=True))
            values |= enumerate([norm, *positions], 2 * size + len(self._state))
            inputs = [values[k] for k, yes in enumerate(used) if yes]
            outputs = eval_jaxpr(jaxpr, traced.consts, *inputs)
            by_place = dict(zip(sorted(wanted), outputs, strict=True))
            found = [by_place[k] for k in wanted]
            return found[: len(group.params)], found[len(group.params) :]

        return run


def needed(jaxpr: Jaxpr, outputs: Collection[int]) -> tuple[Jaxpr, list[bool]]:
    """Returns the part of a program that some of the outputs need, and which inputs that uses."""
    return partial_eval.dce_jaxpr(jaxpr, [k in outputs for k in range(len(jaxpr.outvars))])


def _bits(number: int) -> Iterator[int]:
    """Yields the places of the bits that are set."""
    return (k for k in range(number.bit_length()) if number >> k & 1)


def sources(jaxpr: Jaxpr, inputs: Sequence[int]) -> list[int]:
    """Returns for each output the set of inputs that it depends on, as the bits of a number."""
    found: dict[Any, int] = dict(zip(jaxpr.invars, inputs, strict=True))
    of = lambda x: 0 if isinstance(x, Literal) else found.get(x, 0)  # noqa: E731
    for eqn in jaxpr.eqns:
        found.update(zip(eqn.outvars, _sources_of(eqn, list(map(of, eqn.invars))), strict=True))
    return list(map(of, jaxpr.outvars))


def _sources_of(eqn: Any, inputs: list[int]) -> list[int]:
    if eqn.primitive.name == "cond":
        index, *operands = inputs
        branches = [sources(branch.jaxpr, operands) for branch in eqn.params["branches"]]
        return [functools.reduce(int.__or__, x, index) for x in zip(*branches, strict=True)]
    called = _jaxprs(eqn)
    if eqn.primitive.name in _CALLS and len(called) == 1:
        return sources(called[0], inputs)
    if eqn.primitive.name == "optimization_barrier":
        return inputs
    return [functools.reduce(int.__or__, inputs, 0)] * len(eqn.outvars)


_CALLS = {
    "call", "checkpoint", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call",
    "custom_vjp_call_jaxpr", "jit", "pjit", "remat", "remat2",
}  # fmt: skip
# Operations that place an array without changing it. JAX may add them for one of two shapes.
_PLACING = {"reshard", "sharding_constraint"}
_ELEMENTWISE = {
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh",
    "bitcast_convert_type", "cbrt", "ceil", "clamp", "clz", "complex", "conj",
    "convert_element_type", "copy", "copy_p", "cos", "cosh", "digamma", "div", "eq", "eq_to", "erf",
    "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "imag", "integer_pow",
    "is_finite", "le", "le_to", "lgamma", "log", "log1p", "logistic", "lt", "lt_to", "max", "min",
    "mul", "ne", "neg", "nextafter", "not", "optimization_barrier", "or", "pbroadcast", "pcast",
    "pmax", "pmin", "population_count", "pow", "psum", "psum2", "psum_invariant", "pvary", "real",
    "reduce_precision", "rem", "round", "rsqrt", "select_n", "shift_left", "shift_right_arithmetic",
    "shift_right_logical", "sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub", "tan",
    "tanh", "xor",
}  # fmt: skip
# Operations that keep layers apart if their result has the layer axis: an operation along that axis
# would change its length.
_ALONG_OTHER_AXES = {
    "argmax", "argmin", "broadcast_in_dim", "dot_general", "expand_dims", "pad", "reduce_and",
    "reduce_max", "reduce_min", "reduce_or", "reduce_prod", "reduce_sum", "reduce_xor", "slice",
    "squeeze", "stack", "transpose", "unstack",
}  # fmt: skip
# The parameter that names the axis along which elements are mixed.
_ALONG_AN_AXIS = {
    "concatenate": "dimension", "cumlogsumexp": "axis", "cummax": "axis", "cummin": "axis",
    "cumprod": "axis", "cumsum": "axis", "sort": "dimension",
}  # fmt: skip


class _LayersMixedError(Exception):
    """Why a layer is not updated as if it were alone, as a predicate."""


def _compare(whole: Jaxpr, one: Jaxpr, lengths: set[int]) -> None:
    """Raises an error unless `one` does to one layer what `whole` does to each of all layers."""
    whole_eqns, one_eqns = (
        [eqn for eqn in jaxpr.eqns if eqn.primitive.name not in _PLACING] for jaxpr in (whole, one)
    )
    if len(whole_eqns) != len(one_eqns):
        raise _by_size()
    for a, b in zip(whole_eqns, one_eqns, strict=True):
        if a.primitive is not b.primitive:
            raise _by_size()
        _compare_params(a.params, b.params, lengths)
        pairs = list(zip(a.invars, b.invars, strict=True))
        for x, y in pairs:
            if isinstance(x, Literal) and not (isinstance(y, Literal) and _equal(x.val, y.val)):
                raise _by_size()
        inner = list(zip(_jaxprs(a), _jaxprs(b), strict=True))
        for x, y in inner:
            _compare(x, y, lengths)
        if not (inner and a.primitive.name in {*_CALLS, "cond", "scan", "while"}):
            axes = [_layer_axis(x, y, lengths) for x, y in pairs]
            out_pairs = zip(a.outvars, b.outvars, strict=True)
            _check_operation(a, axes, [_layer_axis(x, y, lengths) for x, y in out_pairs])


def _check_operation(eqn: Any, axes: list[int | None], out_axes: list[int | None]) -> None:
    """Raises an error if an operation mixes layers, given the layer axes of its inputs and outputs.

    Unknown operations count as mixing.
    """
    name, params = eqn.primitive.name, eqn.params
    layered = {axis for axis in axes if axis is not None}
    out_layered = {axis for axis in out_axes if axis is not None}
    if not layered and not out_layered:
        return
    if not layered:
        constant = name == "broadcast_in_dim"
        if not constant and not (name == "iota" and params["dimension"] not in out_layered):
            raise _LayersMixedError(
                f"depends on its place in the stack ({name}), by an operation that does not know "
                "the layer's place"
            )
        return
    if None in out_axes:
        raise _LayersMixedError(f"depends on other layers ({name})")
    known = name in _ELEMENTWISE or name in _ALONG_OTHER_AXES
    if name in _ALONG_AN_AXIS:
        known = params[_ALONG_AN_AXIS[name]] not in layered
    if name == "reshape":
        [axis], [out_axis] = layered, out_layered
        before = eqn.invars[0].aval.shape[:axis]
        known = math.prod(before) == math.prod(eqn.outvars[0].aval.shape[:out_axis])
    if not known:
        raise _LayersMixedError(f"may depend on other layers ({name})")


def _by_size() -> _LayersMixedError:
    return _LayersMixedError(
        "differs in a stack of one layer: something in the optimizer, such as a mask, uses the "
        "number of layers or the size of leaves. Let it use the names of leaves, or their ranks"
    )


def _layer_axis(x: Any, y: Any, lengths: set[int]) -> int | None:
    """Returns the axis of the layers, given an array and the same array for one layer."""
    shape, one = x.aval.shape, y.aval.shape
    if shape == one:
        return None
    if len(shape) != len(one):
        raise _by_size()
    axes = [k for k, (m, n) in enumerate(zip(shape, one, strict=True)) if m != n]
    if len(axes) > 1 or one[axes[0]] != 1 or shape[axes[0]] not in lengths:
        raise _LayersMixedError("joins layers into one axis with other elements")
    return axes[0]


def _compare_params(whole: dict[str, Any], one: dict[str, Any], lengths: set[int]) -> None:
    """Raises an error if the parameters of an operation differ in more than the layers' number."""
    for name, x in whole.items():
        y = one.get(name)
        if isinstance(x, tuple) and isinstance(y, tuple) and len(x) == len(y):
            pairs = list(zip(x, y, strict=True))
        else:
            pairs = [(x, y)]
        for m, n in pairs:
            numbers = isinstance(m, int | float | str) and isinstance(n, int | float | str)
            is_length = isinstance(x, tuple) and m in lengths and n == 1
            if numbers and m != n and not is_length:
                raise _by_size()


def _jaxprs(eqn: Any) -> list[Jaxpr]:
    """Returns the jaxprs in the parameters of an operation."""
    found = []
    for value in eqn.params.values():
        for x in value if isinstance(value, tuple | list) else [value]:
            x = getattr(x, "jaxpr", x)
            if isinstance(x, Jaxpr):
                found.append(x)
    return found


def _equal(x: Any, y: Any) -> bool:
    return bool(
        np.array_equal(np.asarray(x), np.asarray(y), equal_nan=np.asarray(x).dtype.kind in "fc")
    )

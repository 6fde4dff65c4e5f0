"""What an optimizer does to one layer of leaves that are stacked over layers.

The update of a whole tree is traced to a jaxpr, once with all layers and once with one of them, and
dead code is eliminated for the leaves of a stack. So any optimizer will do whose layers and leaves
do not depend on each other, which is determined from the jaxprs.
"""

# Annotations as text, so that what pickles functions with cloudpickle has no types to pickle.
from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.interpreters import partial_eval


class Group(NamedTuple):
    """Leaves that are updated together, by their places in parameters and state."""

    params: list[int]
    state: list[int]


class Update:
    """`update` and `apply_updates` of an optimizer, for parts of the leaves.

    Attributes:
        groups: for each parameter, the leaves that its update depends on.
        shared: the places in the state of what depends on no leaf, such as the count.
    """

    def __init__(
        self,
        optimizer: optax.GradientTransformation,
        params: optax.Params,
        state: optax.OptState,
        stacked: Sequence[bool],
    ):
        self._optimizer = optax.with_extra_args_support(optimizer)
        param_leaves, self._params_tree = jax.tree.flatten(params)
        state_leaves, self._state_tree = jax.tree.flatten(state)
        self._size = len(param_leaves)
        self._whole = self._traced(param_leaves, state_leaves, stacked)
        self._one = self._whole
        param_sources, state_sources = self._sources()
        candidates = _shared(state_sources, self._size)
        self.groups = _groups(param_sources, state_sources, candidates)
        self.shared = []
        for j in candidates:
            bit = 1 << self._size + j
            users = [
                group
                for group in {id(g): g for g in self.groups}.values()
                if any(param_sources[i] & bit for i in group.params)
                or any(state_sources[k] & bit for k in group.state)
            ]
            shape = state_leaves[j].shape
            if len(users) == 1 and shape and shape[:1] == param_leaves[users[0].params[0]].shape[:1]:
                users[0].state.append(j)
            else:
                self.shared.append(j)
        of_stacks = {j for i, yes in enumerate(stacked) if yes for j in self.groups[i].state}
        self._one = self._traced(
            [_one_layer(x) if yes else x for x, yes in zip(param_leaves, stacked, strict=True)],
            [_one_layer(x) if j in of_stacks else x for j, x in enumerate(state_leaves)],
            stacked,
        )

    def of_rest(self, group: Group) -> Any:
        """Returns the function for leaves that are not stacked, with what is shared."""
        return self._part(self._whole, group, self.shared)

    def of_layer(self, group: Group) -> Any:
        """Returns the function for one layer of leaves that are stacked."""
        return self._part(self._one, group, [])

    def _traced(self, params: Sequence[Any], state: Sequence[Any], stacked: Sequence[bool]) -> Any:
        def update(gradients: Any, params: Any, state: Any, positions: Any) -> Any:
            gradients, params = map(self._params_tree.unflatten, (gradients, params))
            state = self._state_tree.unflatten(state)
            updates, state = self._optimizer.update(gradients, state, params, positions=positions)
            return jax.tree.leaves((optax.apply_updates(params, updates), state))

        lengths = {x.shape[0] for x, yes in zip(params, stacked, strict=True) if yes}
        positions = [jax.ShapeDtypeStruct((length,), jnp.int32) for length in sorted(lengths)]
        return jax.make_jaxpr(update)(list(params), list(params), list(state), positions)

    def _sources(self) -> tuple[list[int], list[int]]:
        size = self._size
        jaxpr = self._whole.jaxpr
        states = len(jaxpr.outvars) - size
        bits = [1 << i for i in range(size + states)]
        others = [0] * (len(jaxpr.invars) - 2 * size - states)
        found = sources(jaxpr, [*bits[:size], *bits, *others])
        return found[:size], found[size:]

    def _part(self, traced: ClosedJaxpr, group: Group, shared: Sequence[int]) -> Any:
        size = self._size
        wanted = [*group.params, *(size + j for j in group.state), *(size + j for j in shared)]
        used = [False] * len(traced.jaxpr.outvars)
        for k in wanted:
            used[k] = True
        jaxpr, used_inputs = partial_eval.dce_jaxpr(traced.jaxpr, used)
        order = sorted(wanted)

        def run(gradients: Any, params: Any, state: Any, shared_state: Any, positions: Any) -> Any:
            """Takes and returns leaves in the order of the group."""
            values = dict(zip(group.params, gradients, strict=True))
            values |= dict(zip((size + i for i in group.params), params, strict=True))
            values |= dict(zip((2 * size + j for j in group.state), state, strict=True))
            values |= dict(zip((2 * size + j for j in self.shared), shared_state, strict=True))
            first = len(traced.jaxpr.invars) - len(positions)
            values |= {first + k: x for k, x in enumerate(positions)}
            inputs = [values[k] for k, yes in enumerate(used_inputs) if yes]
            outputs = jax.core.eval_jaxpr(jaxpr, traced.consts, *inputs)
            by_place = dict(zip(order, outputs, strict=True))
            found = [by_place[k] for k in wanted]
            a, b = len(group.params), len(group.params) + len(group.state)
            return found[:a], found[a:b], found[b:]

        return run


def sources(jaxpr: Jaxpr, inputs: Sequence[int]) -> list[int]:
    """Returns for each output the union of the sets of inputs that it depends on, as bits."""
    found: dict[Any, int] = dict(zip(jaxpr.invars, inputs, strict=True))
    of = lambda x: 0 if isinstance(x, Literal) else found.get(x, 0)  # noqa: E731
    for eqn in jaxpr.eqns:
        found.update(zip(eqn.outvars, _sources_of(eqn, list(map(of, eqn.invars))), strict=True))
    return list(map(of, jaxpr.outvars))


def _sources_of(eqn: Any, inputs: list[int]) -> list[int]:
    everything = functools.reduce(int.__or__, inputs, 0)
    if eqn.primitive.name == "cond":
        index, *operands = inputs
        branches = [sources(branch.jaxpr, operands) for branch in eqn.params["branches"]]
        return [index | functools.reduce(int.__or__, x) for x in zip(*branches, strict=True)]
    called = called_jaxpr(eqn)
    if called is not None:
        return sources(called, inputs)
    return [everything] * len(eqn.outvars)


def called_jaxpr(eqn: Any) -> Jaxpr | None:
    """Returns what an equation calls once, with its operands as they are."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = eqn.params.get(name)
        inner = getattr(inner, "jaxpr", inner)
        if eqn.primitive.name not in ("scan", "while") and isinstance(inner, Jaxpr):
            return inner
    return None


def _shared(state_sources: Sequence[int], params: int) -> list[int]:
    """Returns the places of the state's leaves that depend on no gradient and no parameter."""
    own = (1 << params) - 1
    shared = set(range(len(state_sources)))
    while depend := {j for j in shared if state_sources[j] & own}:
        shared -= depend
        own |= sum(1 << params + j for j in depend)
    return sorted(shared)


def _groups(
    param_sources: Sequence[int], state_sources: Sequence[int], shared: Iterable[int]
) -> list[Group]:
    params = len(param_sources)
    ignored = sum(1 << params + j for j in shared)
    found = [1 << k | x & ~ignored for k, x in enumerate([*param_sources, *state_sources])]
    merged: list[int] = []
    for k, bits in enumerate(found):
        if ignored >> k & 1:
            continue
        apart = [x for x in merged if not x & bits]
        joint = [x for x in merged if x & bits]
        merged = [*apart, functools.reduce(int.__or__, joint, bits)]
    by_param: dict[int, Group] = {}
    for bits in merged:
        places = [k for k in range(len(found)) if bits >> k & 1]
        group = Group([k for k in places if k < params], [k - params for k in places if k >= params])
        by_param |= dict.fromkeys(group.params, group)
    return [by_param[i] for i in range(params)]


def _one_layer(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)

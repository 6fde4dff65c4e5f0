"""Keeps optimizer state in host memory, from which a step fetches it leaf by leaf.

The update of the whole tree is traced once. Results that several leaves need and that use nothing
in host memory, such as bias corrections and the norm of all gradients, are computed first. The
rest is split into one program for each leaf. These programs run in turn: each fetches its state,
computes and returns the state before the next one fetches anything.
"""

# Annotations stay text: cloudpickle then has no types to pickle along with a function.
from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import eval_jaxpr
from jax.extend.core import Jaxpr, Literal

from adam_jax._layers import needed, sources
from adam_jax._sharding import barrier, device_type, fetched, in_host, to_host, zeros_of
from adam_jax._state import with_extra_args

Leaves = list[Any]
Values = dict[int, Any]  # by place


def offload(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Keeps an optimizer's state in host memory, and fetches it leaf by leaf in each step.

    A device then holds weights, gradients, and the state of one or two leaves at a time. With
    `value_and_update` it fetches the state layer by layer. If the step is jitted and the state
    donated, new state overwrites the old one in host memory. Scalars, such as counts, stay on the
    device. The step computes the same numbers as without `offload`.

        optimizer = adam_jax.offload(adam_jax.adamw(1e-3))
        state = optimizer.init(params)
        step = jax.jit(step, donate_argnums=(0, 1))

    On a mesh, jit `init` and the step with the `state_shardings` of this optimizer as their
    `out_shardings`. In each step the state crosses between host and device twice: in float32 that
    is 16 bytes per parameter, with int8 moments 4. Wrap the whole chain, so that transformations
    which need all gradients, such as `optax.clip_by_global_norm`, run before anything is fetched.
    Leaves whose updates depend on each other's state are fetched together.

    Args:
        inner: any optax gradient transformation.

    Returns:
        A transformation with the state of `inner`, whose arrays are in JAX's `pinned_host` memory.
        Given a state in device memory, it makes the update of `inner` there.

    Raises:
        ValueError: in `init`, on devices without such memory; in `update`, for an optimizer with
            side effects.
        ImportError: with JAX before 0.10, whose programs cannot return arrays in host memory.

    Examples:
        >>> import adam_jax, jax, jax.numpy as jnp
        >>> optimizer = adam_jax.offload(adam_jax.adam(0.1))
        >>> state = optimizer.init({"w": jnp.ones((256, 128))})
        >>> state[0].mu["w"].sharding.memory_kind
        'pinned_host'
    """
    if jax.__version_info__ < (0, 10):
        raise ImportError(
            f"offload needs JAX 0.10 or later, whose programs can return arrays in host memory, "
            f"but this is JAX {jax.__version__}. Upgrade JAX, or use the optimizer without offload."
        )
    inner = with_extra_args(inner)

    def init(params: optax.Params) -> optax.OptState:
        _check_platform()
        return jax.tree.map(lambda x: to_host(x) if jnp.ndim(x) else x, inner.init(params))

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        if not any(map(in_host, jax.tree.leaves(state))):
            return inner.update(updates, state, params, **extra_args)
        given, tree = jax.tree.flatten((updates, params))
        stored, state_tree = jax.tree.flatten(state)
        out_tree: Any = None

        def function(*leaves: Any) -> Leaves:
            nonlocal out_tree
            updates, params = tree.unflatten(leaves[: len(given)])
            state = state_tree.unflatten(leaves[len(given) :])
            result = inner.update(updates, state, params, **extra_args)
            outputs, out_tree = jax.tree.flatten(result)
            return outputs

        size = len(jax.tree.leaves(updates))
        outputs = leaf_by_leaf(function, given, stored, {i: i for i in range(size)})
        return out_tree.unflatten(outputs)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_platform() -> None:
    device = jax.devices()[0]
    kinds = {memory.kind for memory in device.addressable_memories()}
    if "pinned_host" not in kinds:
        raise ValueError(
            f"offload needs devices whose programs can use pinned_host memory, but those of "
            f"platform {device.platform!r} have {', '.join(sorted(kinds)) or 'none'}. Use the "
            "optimizer without offload."
        )


def leaf_by_leaf(
    function: Callable[..., Leaves], given: Leaves, stored: Leaves, over: dict[int, int]
) -> Leaves:
    """Returns function(*given, *stored), and fetches `stored` from host memory leaf by leaf.

    The function's results end with the new state. `over` maps places among its results to an entry
    of `given` that is not needed any more, so that the result can overwrite it.
    """
    traced = jax.make_jaxpr(function)(*map(device_type, (*given, *stored)))
    jaxpr = traced.jaxpr.replace(
        constvars=[], invars=[*traced.jaxpr.invars, *traced.jaxpr.constvars]
    )
    _check_effects(jaxpr)
    hosted = {len(given) + j: j for j, x in enumerate(stored) if in_host(x)}
    new_state = len(jaxpr.outvars) - len(stored)
    parts = _parts(jaxpr, hosted, new_state)
    before, after = _split(jaxpr, hosted, parts)
    values = [*given, *stored, *traced.consts]
    values += eval_jaxpr(before, (), *values)
    # The compiler does not know that this is 1. Each part passes it to the next, so they run in
    # turn.
    once = jax.lax.optimization_barrier(jnp.int32(1))
    results: Values = {}
    producers = _producers(after)
    for part in parts:
        program = _Program.of(after, part.outputs, producers)
        home = {new_state + j: len(given) + j for j in part.leaves}
        inputs = {k: values[k] for k in program.places if k not in hosted}
        state = {place: values[place] for place in home.values()}
        types = {k: jaxpr.outvars[k].aval for k in part.outputs if k not in home}
        own = {
            k: over[k]
            for k, x in types.items()
            if over.get(k) in inputs and jax.typeof(inputs[over[k]]) == x
        }
        step = functools.partial(program.step, home)
        once, new, state = _in_turn(step, once, inputs, types, own, state)
        results |= new | {k: state[place] for k, place in home.items()}
    rest = [k for k in range(len(jaxpr.outvars)) if k not in results]
    rest = _Program.of(after, rest, producers)
    results |= rest.run(dict(enumerate(values)))
    return [results[k] for k in range(len(jaxpr.outvars))]


def _check_effects(jaxpr: Jaxpr) -> None:
    """Raises ValueError if an operation has effects even where no result is needed."""
    effects, _ = needed(jaxpr, ())
    if effects.eqns:
        names = ", ".join(sorted({eqn.primitive.name for eqn in effects.eqns if eqn.effects}))
        raise ValueError(
            f"the optimizer inside offload has side effects ({names}), which belong to no leaf, "
            "but offload splits the update by leaves. Put a wrapper that has them outside, as in "
            "check_landing(offload(...)), or remove jax.debug calls."
        )


class _Program(NamedTuple):
    """A program that computes some of the outputs."""

    jaxpr: Jaxpr
    places: list[int]  # of the inputs that it takes
    outputs: list[int]

    @classmethod
    def of(cls, jaxpr: Jaxpr, outputs: list[int], producers: dict[Any, int]) -> _Program:
        # Most equations belong to other leaves: leaving them out here saves `needed` the work.
        eqns = [jaxpr.eqns[i] for i in _behind(jaxpr, outputs, producers)]
        program, used = needed(jaxpr.replace(eqns=eqns), outputs)
        return cls(program, [k for k, yes in enumerate(used) if yes], outputs)

    def run(self, inputs: Values) -> Values:
        """Returns the outputs."""
        outputs = eval_jaxpr(self.jaxpr, (), *(inputs[k] for k in self.places))
        return dict(zip(self.outputs, outputs, strict=True))

    def step(self, home: dict[int, int], inputs: Values, state: Values) -> tuple[Values, Values]:
        """Returns the outputs that stay on the device, and the new state by its places."""
        outputs = self.run(inputs | state)
        new = {k: x for k, x in outputs.items() if k not in home}
        return new, {place: outputs[k] for k, place in home.items()}


def _in_turn(
    step: Callable[[Values, Values], tuple[Values, Values]],
    once: jax.Array,
    inputs: Values,
    types: Values,
    own: dict[int, int],
    state: Values,
) -> tuple[jax.Array, Values, Values]:
    """Returns `once` and the results of a step, with the state in host memory.

    `types` has the types of results that stay on the device, and `own` maps them to the inputs that
    they can overwrite.
    """

    def on_tpu(once: jax.Array, inputs: Values, state: Values) -> Any:
        # XLA for TPU fetches as early as it can, but never for a loop before the loop begins.
        others = {k: x for k, x in inputs.items() if k not in own.values()}

        def body(carry: Any) -> Any:
            i, new, state = carry
            old = {place: new[k] for k, place in own.items()}
            new, state = step(others | old, fetched(state))
            return i + 1, new, jax.tree.map(to_host, state)

        new = {k: inputs[own[k]] if k in own else zeros_of(x) for k, x in types.items()}
        return jax.lax.while_loop(lambda carry: carry[0] < once, body, (0 * once, new, state))

    def elsewhere(once: jax.Array, inputs: Values, state: Values) -> Any:
        once, inputs, state = barrier((once, inputs, fetched(state)))
        new, state = step(inputs, state)
        once, state = barrier((once, state))
        return once, new, jax.tree.map(to_host, state)

    def plain(once: jax.Array, inputs: Values, state: Values) -> Any:
        new, state = step(inputs, fetched(state))
        return once, new, jax.tree.map(to_host, state)

    # A loop has no derivative, but its body runs once.
    in_turn = jax.custom_jvp(
        lambda *args: jax.lax.platform_dependent(*args, tpu=on_tpu, default=elsewhere)
    )
    in_turn.defjvp(functools.partial(jax.jvp, plain))
    return in_turn(once, inputs, state)


class _Part(NamedTuple):
    """Leaves of the state that are fetched together, by their places in the state."""

    leaves: list[int]
    outputs: list[int]  # places among the outputs, in order


def _parts(jaxpr: Jaxpr, hosted: dict[int, int], new_state: int) -> list[_Part]:
    """Returns the leaves in host memory in groups. Each output depends on one group at most."""
    bit = {k: 1 << j for k, j in hosted.items()}
    found = sources(jaxpr, [bit.get(k, 0) for k in range(len(jaxpr.invars))])
    for j in hosted.values():
        found[new_state + j] |= 1 << j
    groups: list[int] = []
    for bits in found:
        if bits:
            joint = [x for x in groups if x & bits]
            groups = [x for x in groups if not x & bits]
            groups.append(functools.reduce(int.__or__, joint, bits))
    return [
        _Part(
            [j for j in hosted.values() if group >> j & 1],
            [k for k, bits in enumerate(found) if bits & group],
        )
        for group in groups
    ]


def _split(jaxpr: Jaxpr, hosted: dict[int, int], parts: Sequence[_Part]) -> tuple[Jaxpr, Jaxpr]:
    """Returns two programs. The second takes the results of the first as further inputs.

    The first computes what several parts need and what uses nothing in host memory.
    """
    producers = _producers(jaxpr)
    users = collections.Counter(
        i for part in parts for i in _behind(jaxpr, part.outputs, producers)
    )
    fetched = {jaxpr.invars[k] for k in hosted}
    first, second = [], []
    for i, eqn in enumerate(jaxpr.eqns):
        if fetched.intersection(_variables(eqn.invars)):
            fetched.update(eqn.outvars)
        common = users[i] > 1 and not fetched.intersection(eqn.outvars)
        (first if common else second).append(eqn)
    used = {x for eqn in second for x in _variables(eqn.invars)}
    used.update(_variables(jaxpr.outvars))
    between = [x for eqn in first for x in eqn.outvars if x in used]
    return (
        jaxpr.replace(eqns=first, outvars=between),
        jaxpr.replace(eqns=second, invars=[*jaxpr.invars, *between]),
    )


def _producers(jaxpr: Jaxpr) -> dict[Any, int]:
    """Returns the place of the equation that computes each variable."""
    return {x: i for i, eqn in enumerate(jaxpr.eqns) for x in eqn.outvars}


def _behind(jaxpr: Jaxpr, outputs: list[int], producers: dict[Any, int]) -> list[int]:
    """Returns the places of the equations that some of the outputs depend on, in order."""
    found: set[int] = set()
    wanted = _variables(jaxpr.outvars[k] for k in outputs)
    while wanted:
        i = producers.get(wanted.pop())
        if i is not None and i not in found:
            found.add(i)
            wanted += _variables(jaxpr.eqns[i].invars)
    return sorted(found)


def _variables(atoms: Any) -> list[Any]:
    return [x for x in atoms if not isinstance(x, Literal)]

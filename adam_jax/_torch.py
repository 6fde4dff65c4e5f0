"""Converts optimizer state from torch and to torch, to continue a training run."""

import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adam_jax._amsgrad import Maximum
from adam_jax._checks import check_choice, keystr
from adam_jax._codec import Moments, codec_of
from adam_jax._convert import convert_state, written
from adam_jax._moments import arithmetic_dtype
from adam_jax._rounding import draws
from adam_jax._sharding import fetched, in_memory_of
from adam_jax._state import WITH_MOMENTS, leaves_of, states_with_moments, with_leaves
from adam_jax._storage import Int8Moment
from adam_jax._types import is_masked

Arrays = dict[str, jax.Array]
ToParams = Callable[[Arrays], optax.Params]


def from_torch(
    torch_state: Mapping[str, Any], torch_params: Mapping[str, Any], to_params: ToParams, state: Any
) -> Any:
    """Returns the state with which a training run that began in torch continues here.

    `to_params` makes the JAX model's parameters from the torch model's weights: it takes a dict of
    arrays by name and returns them renamed, transposed, reshaped, split or joined, as the tree of
    parameters. `from_torch` applies it to the moments too.

    | in torch | here |
    |---|---|
    | `step` | `count`, of schedules too |
    | `exp_avg` | `mu` |
    | `exp_avg_sq`, Adamax: `exp_inf` | `nu` |
    | `max_exp_avg_sq` | `nu_max`, as in `amsgrad(maximum="raw")` |

    Pass the hyperparameters to the optimizer here; those of torch's groups are ignored. A parameter
    that never had a gradient has no state in torch, and gets moments of 0 here. torch's NAdam warms
    b1 up and ours does not: the two agree with a large `momentum_decay`, and after many steps.

    Args:
        torch_state: the `state_dict()` of torch's Adam, AdamW, NAdam or Adamax, with or without
            `amsgrad`. Arrays may replace tensors, and numbers may replace steps.
        torch_params: torch's parameters by name, in the order in which its optimizer got them, one
            group after the other: `dict(model.named_parameters())`. Only their shapes matter.
        to_params: the function described above, made of methods of arrays and functions of
            `jax.numpy`.
        state: the state that `init` returned, with states of `scale_by_adam`, `scale_by_amsgrad` or
            `scale_by_adamax` in it, at any depth, in any storage format. Several of them may share
            the parameters, as under `optax.multi_transform`.

    Returns:
        The state with torch's moments and counts in it.

    Raises:
        ValueError: where names, shapes or steps do not fit, if the optimizers differ, or if torch's
            optimizer has made no step.
        TypeError: for complex parameters, each of which is two real ones to torch.

    Examples:
        >>> import adam_jax, jax.numpy as jnp, numpy as np
        >>> weight = np.zeros((1, 2))  # of a torch.nn.Linear(2, 1, bias=False)
        >>> torch_state = {
        ...     "state": {0: {"step": 7, "exp_avg": weight + 0.5, "exp_avg_sq": weight + 0.25}},
        ...     "param_groups": [{"params": [0], "betas": (0.9, 0.999), "amsgrad": False}],
        ... }
        >>> to_params = lambda torch: {"kernel": torch["weight"].T}
        >>> state = adam_jax.adam(1e-3).init({"kernel": jnp.zeros((2, 1))})
        >>> state = adam_jax.from_torch(torch_state, {"weight": weight}, to_params, state)
        >>> int(state[0].count), state[0].mu["kernel"].shape
        (7, (2, 1))
    """
    slots = _slots(torch_state, torch_params, states_with_moments(state))
    entries = {name: torch_state["state"].get(slot.key, {}) for name, slot in slots.items()}
    steps = {name: int(entry.get("step", 0)) for name, entry in entries.items()}
    if not any(steps.values()):
        raise ValueError("torch's optimizer has made no step: start with the state of init.")
    shapes = {name: np.shape(param) for name, param in torch_params.items()}

    def array(name: str, torch_field: str) -> jax.Array:
        if not entries[name]:
            return jnp.zeros(shapes[name])
        if torch_field not in entries[name]:
            raise ValueError(
                f"torch_state has no {torch_field} for {name!r}, but {', '.join(entries[name])}. "
                "Pass the state_dict() of the torch optimizer that this one continues."
            )
        array = _array(entries[name][torch_field])
        if jnp.iscomplexobj(array):
            raise TypeError(
                f"{name!r} is complex, and torch's optimizers treat a complex parameter as two "
                "real ones, which have no counterpart here. Start with the state of init."
            )
        if array.shape != shapes[name]:
            raise ValueError(
                f"{torch_field} of {name!r} has shape {array.shape}, but the parameter has "
                f"{shapes[name]}. torch_params must be in the order in which torch's optimizer "
                "got them."
            )
        return array

    def in_params(arrays: dict[str, Any]) -> Any:
        return _rearranged(
            lambda x: to_params(jax.tree.map(lambda x: jnp.asarray(x, float), x)), arrays
        )

    trees = {
        field: in_params({name: array(name, slot.fields[field]) for name, slot in slots.items()})
        for field in next(iter(slots.values())).fields
    }
    counts = in_params({name: np.full(shape, steps[name]) for name, shape in shapes.items()})

    def moved(x: Any) -> Any:
        if isinstance(x, WITH_MOMENTS):
            return _filled(x, trees, counts)
        return x._replace(count=_count(max(steps.values()))) if _is_count(x) else x

    return jax.tree.map(moved, state, is_leaf=lambda x: isinstance(x, WITH_MOMENTS) or _is_count(x))


def to_torch(
    state: Any,
    torch_state: Mapping[str, Any],
    torch_params: Mapping[str, Any],
    to_params: ToParams,
    *,
    maximum: Maximum | None = None,
) -> dict[str, Any]:
    r"""Returns the `state_dict()` with which a training run that began here continues in torch.

    This is the inverse of `from_torch`, with the same `to_params`, which `jax.linear_transpose`
    inverts. Convert the weights the same way: `jax.linear_transpose(to_params, weights)(params)`,
    where `weights` are arrays with torch's names and shapes.

    Args:
        state: an optimizer state with states of `scale_by_adam`, `scale_by_amsgrad` or
            `scale_by_adamax` in it, at any depth, in any storage format.
        torch_state: the `state_dict()` of the torch optimizer that is to continue, with or without
            steps. Its groups are kept.
        torch_params: torch's parameters by name, in the order in which its optimizer got them. If
            they are tensors, the result has tensors.
        to_params: the function of `from_torch` from torch's weights to the parameters here. It must
            use each element of each weight once.
        maximum: `"raw"` or `"corrected"`, as in the `amsgrad` that made the state. torch's maximum
            is the raw one. A corrected maximum, such as optax's, is multiplied by $1 - \beta_2^t$.
            That makes torch's next step as long as ours; later ones may be up to
            $(1 - \beta_2^t)^{-1/2}$ times as long. The numbers mostly tell which of the two it is:
            pass this only if an error asks for it.

    Returns:
        A dict for `load_state_dict`, with moments in the parameters' dtypes. Parameters without a
        step have no entry.

    Raises:
        ValueError: where names or shapes do not fit, or if the optimizers differ; if `to_params`
            leaves an element out, uses it twice, or does arithmetic; if AMSGrad's maximum may be
            either of the two.

    Examples:
        >>> import adam_jax, jax.numpy as jnp, numpy as np
        >>> torch_params = {"weight": np.zeros((1, 2), np.float32)}
        >>> groups = [{"params": [0], "betas": (0.9, 0.999), "amsgrad": False}]
        >>> optimizer = adam_jax.adam(1e-3)
        >>> params = {"kernel": jnp.zeros((2, 1))}
        >>> _, state = optimizer.update({"kernel": jnp.ones((2, 1))}, optimizer.init(params))
        >>> torch_state = adam_jax.to_torch(
        ...     state,
        ...     {"state": {}, "param_groups": groups},
        ...     torch_params,
        ...     lambda torch: {"kernel": torch["weight"].T},
        ... )
        >>> torch_state["state"][0]["step"].item(), torch_state["state"][0]["exp_avg"].shape
        (1.0, (1, 2))
    """
    if maximum is not None:
        check_choice("maximum", maximum, ("raw", "corrected"))
    states = states_with_moments(convert_state(state))
    slots = _slots(torch_state, torch_params, states)
    arrays = {
        name: jax.ShapeDtypeStruct(np.shape(param), jnp.result_type(float))
        for name, param in torch_params.items()
    }
    like = jax.eval_shape(to_params, arrays)
    transpose = jax.linear_transpose(to_params, arrays)
    uses = transpose(jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), like))[0]
    for name, times in uses.items():
        if not np.all(times == 1):
            raise ValueError(
                f"to_params must use each element of {name!r} once to have an inverse, but it uses "
                f"some of them {times.min():g} and some {times.max():g} times."
            )

    zeros = jax.tree.map(lambda x: np.broadcast_to(np.int8(0), x.shape), like)

    def back(params: optax.Params) -> Arrays:
        return transpose(jax.tree.map(lambda x, like: jnp.asarray(x, like.dtype), params, like))[0]

    def named(tree_of: Callable[[Any], Any]) -> dict[str, Any]:
        """Returns by torch's names the leaves that each state has of its own."""
        parts = [
            jax.tree.map(
                lambda leaf, zero: zero if is_masked(leaf) else np.asarray(leaf),
                tree_of(x),
                zeros,
                is_leaf=is_masked,
            )
            for x in states
        ]
        return _rearranged(back, jax.tree.map(lambda *xs: functools.reduce(np.add, xs), *parts))

    steps = named(lambda x: jax.tree.map(lambda leaf: np.full(leaf.shape, x.count), x.mu))
    moments = {field: named(operator.attrgetter(field)) for field in _fields(states[0])}
    last_steps = {name: int(np.max(step, initial=0)) for name, step in steps.items()}
    if "nu_max" in moments:
        corrections = {
            name: 1 - slot.group["betas"][1] ** max(last_steps[name], 1)
            for name, slot in slots.items()
        }
        if not _is_raw(maximum, moments, corrections, state):
            moments["nu_max"] = {
                name: x * np.asarray(corrections[name], x.dtype)
                for name, x in moments["nu_max"].items()
            }
    entries = {}
    for name, slot in slots.items():
        step = last_steps[name]
        if step:
            param = torch_params[name]
            entry = {"step": _number(param, step)}
            if "momentum_decay" in slot.group:
                entry["mu_product"] = _number(param, _mu_product(slot.group, step))
            for field, torch_field in slot.fields.items():
                entry[torch_field] = _like(param, moments[field][name])
            entries[slot.key] = entry
    return {**torch_state, "state": entries}


def _is_raw(
    maximum: Maximum | None, moments: dict[str, Arrays], corrections: dict[str, float], state: Any
) -> bool:
    """Returns whether AMSGrad's maximum is of v, and not of v / (1 - b2^t).

    A corrected maximum is never less than the present v / (1 - b2^t). A raw one equals v where v is
    at its largest.
    """
    if maximum is not None:
        return maximum == "raw"
    dtypes = {x.dtype for x in jax.tree.leaves([x.nu_max for x in states_with_moments(state)])}
    tolerance = 2.0**-6 if np.dtype(jnp.bfloat16) in dtypes else 1e-5  # twice the rounding error
    corrected = {name: moments["nu"][name] / c for name, c in corrections.items()}
    if any(
        np.any(moments["nu_max"][name] < (1 - tolerance) * x) for name, x in corrected.items()
    ) or all(c > 1 - tolerance for c in corrections.values()):
        return True
    raise ValueError(
        "AMSGrad's maximum may be the raw one, as in torch, or the corrected one. Pass the one "
        "that the optimizer uses: to_torch(..., maximum='raw') or to_torch(..., "
        "maximum='corrected')."
    )


def _rearranged(function: Callable[[Any], Any], tree: Any) -> Any:
    """Returns the result of a function that moves the elements of a tree, with unchanged numbers.

    The function may also cast, as parameters are cast to bfloat16. So it gets the bytes of the
    numbers, one after the other, as numbers that every dtype holds.
    """
    arrays = jax.tree.map(np.asarray, tree)
    dtype = np.result_type(*jax.tree.leaves(arrays))

    def as_bytes(x: jax.Array) -> Any:
        numbers = np.asarray(x, np.float32)
        words = numbers.astype(np.uint8)
        if np.any(words != numbers):
            raise ValueError(
                "to_params does arithmetic. It may only rename, transpose, reshape, split, join "
                "and cast weights, because it is applied to their moments too."
            )
        return words

    def moved(i: int) -> Any:
        planes = jax.tree.map(
            lambda x: x.astype(dtype)[..., None].view(np.uint8)[..., i].astype(np.float32), arrays
        )
        return jax.tree.map(as_bytes, function(planes))

    return jax.tree.map(
        lambda *words: np.stack(words, axis=-1).view(dtype)[..., 0],
        *map(moved, range(dtype.itemsize)),
    )


class _Slot(NamedTuple):
    """The place where torch keeps the state of a parameter."""

    key: Any  # of its state: a number, or its name
    group: Mapping[str, Any]
    fields: dict[str, str]  # torch's name of each of our moments


def _slots(
    torch_state: Mapping[str, Any], torch_params: Mapping[str, Any], states: list[Any]
) -> dict[str, _Slot]:
    """Returns the slot of each of torch's parameters, by name, in the order of `torch_params`."""
    groups = torch_state["param_groups"]
    keys = [(key, group) for group in groups for key in group["params"]]
    # torch.distributed makes states whose keys are names. Since torch 2.6 a group may have names
    # as well as keys. Otherwise only the order connects keys and names.
    found = [name for group in groups for name in group.get("param_names", group["params"])]
    named = all(isinstance(name, str) for name in found)
    names = found if named else list(torch_params)
    if len(names) != len(keys) or set(names) != set(torch_params):
        raise ValueError(
            f"torch's optimizer has {len(keys)} parameters ({_first(found)}), but torch_params has "
            f"{len(torch_params)} ({_first(torch_params)}). They must be the same."
        )
    slots = {}
    for name, (key, group) in zip(names, keys, strict=True):
        slots[name] = _Slot(key, group, fields := _torch_fields(group))
        for x in states:
            if fields.keys() != set(_fields(x)):
                raise ValueError(
                    f"torch's optimizer has {', '.join(fields.values())} for {name!r}, but the "
                    f"{type(x).__name__} here has {', '.join(_fields(x))}. Only AMSGrad can "
                    "continue AMSGrad, and it can continue nothing else."
                )
    return {name: slots[name] for name in torch_params}


def _first(names: Iterable[Any]) -> str:
    """Returns the first three names as text."""
    first, more = list(names)[:3], list(names)[3:]
    return ", ".join([*map(str, first), *["..."] * bool(more)])


def _torch_fields(group: Mapping[str, Any]) -> dict[str, str]:
    fields = {"mu": "exp_avg", "nu": "exp_avg_sq"}
    if "amsgrad" in group or "momentum_decay" in group:  # Adam and AdamW; NAdam
        return fields | ({"nu_max": "max_exp_avg_sq"} if group.get("amsgrad") else {})
    if {"betas", "weight_decay"} <= group.keys() and "decoupled_weight_decay" not in group:
        return fields | {"nu": "exp_inf"}  # Adamax
    raise ValueError(
        "torch_state must be that of torch's Adam, AdamW, NAdam or Adamax, but its groups have "
        f"{', '.join(group)}."
    )


def _fields(state: Any) -> list[str]:
    return [field for field in state._fields if field != "count"]


def _filled(state: Any, trees: dict[str, Any], counts: Any) -> Any:
    """Returns a state with these numbers in its formats, and with the count of all its leaves."""
    paths, treedef = jax.tree.flatten_with_path(state.mu, is_leaf=is_masked)

    def leaves(tree: Any) -> list[Any]:
        try:
            return treedef.flatten_up_to(tree)
        except ValueError as error:
            raise ValueError(
                f"to_params does not return a tree like the parameters of the state: {error}"
            ) from error

    steps = {}
    for (path, leaf), count in zip(paths, leaves(counts), strict=True):
        if not is_masked(leaf):
            # One parameter here may come from several of torch's. Those without a step fit any
            # count.
            steps |= {int(step): path for step in np.unique(count) if step}
    if len(steps) > 1:
        made = " and ".join(f"{n} steps at {keystr(path)}" for n, path in steps.items())
        raise ValueError(
            f"torch has made {made}, but a state has one count. Give parameters with different "
            "counts different optimizers, with optax.multi_transform."
        )

    stored = leaves_of(state, state.mu, is_masked)
    new = zip(*(leaves(trees[field]) for field in _fields(state)), strict=True)
    count = _count(max(steps, default=0))
    filled = []
    drawn = draws(len(paths), count)
    for (path, _), like, numbers, draw in zip(paths, stored, new, drawn, strict=True):
        if not is_masked(like.mu):
            for field, x in zip(_fields(state), numbers, strict=True):
                if np.shape(x) != like.mu.shape:
                    raise ValueError(
                        f"to_params gives {keystr(path)} the shape {np.shape(x)}, but state."
                        f"{field} there has {like.mu.shape}. Does to_params have to transpose it?"
                    )
            dtype = codec_of(like).arithmetic_dtype(np.float32)
            numbers = cast(Moments, tuple(x.astype(dtype) for x in numbers))
            new = written(numbers, fetched(like), draw, count)
            like = jax.tree.map(in_memory_of, like, new)
        filled.append(like)
    int8 = isinstance(state.nu, Int8Moment)
    state = state._replace(count=count)
    return with_leaves(state, filled, state.mu, int8=int8, is_leaf=is_masked)


def _is_count(x: Any) -> bool:
    """Returns whether this is the state of a schedule: a count of steps and nothing else."""
    return getattr(x, "_fields", None) == ("count",)


def _count(step: int) -> jax.Array:
    return jnp.asarray(step, jnp.int32)


def _mu_product(group: Mapping[str, Any], step: int) -> float:
    """Returns the product of NAdam's b1, which torch warms up, over all steps."""
    b1, _ = group["betas"]
    t = np.arange(1, step + 1)
    return float(np.prod(b1 * (1 - 0.5 * 0.96 ** (t * group["momentum_decay"]))))


# These functions use only methods of tensors, and work without importing torch.


def _array(x: Any) -> jax.Array:
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        x = (x.float() if x.element_size() == 2 else x).numpy()  # NumPy has no bfloat16
    return jnp.asarray(x)


def _like(param: Any, x: jax.Array) -> Any:
    """Returns an array as a tensor of the parameter's dtype and device, if that is a tensor."""
    if hasattr(param, "detach"):
        return param.detach().new_tensor(np.array(x))
    return np.array(x, param.dtype)


def _number(param: Any, x: float) -> Any:
    """Returns a number on the CPU, where torch keeps it, in float32 or, for float64, in float64."""
    if hasattr(param, "detach"):
        zero = param.detach().new_zeros((), device="cpu")
        return (zero.float() if zero.element_size() < 8 else zero) + x
    return np.asarray(x, arithmetic_dtype(param.dtype))

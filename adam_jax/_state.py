"""Converts between the trees of a state and its leaves."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from adam_jax._checks import flatten_up_to, keystr, leaf_path
from adam_jax._codec import Rows, Stored
from adam_jax._storage import Int8Moment
from adam_jax._types import Mask, is_function, is_masked, is_none

T = TypeVar("T")
WITH_MOMENTS = (optax.ScaleByAdamState, optax.ScaleByAmsgradState)


def node_types(tree: Any) -> set[type[Any]]:
    """Returns the types of the containers in a tree."""
    types: set[type[Any]] = set()
    nodes = [jax.tree.structure(tree)]
    while nodes:
        node = nodes.pop()
        if not jax.tree_util.treedef_is_leaf(node):
            types.add(node.node_data()[0])
            nodes += node.children()
    return types


def states_of(kind: type[T] | tuple[type[T], ...], state: Any) -> list[T]:
    """Returns all states of a kind in an optimizer's state, at any depth."""
    is_kind = lambda x: isinstance(x, kind)  # noqa: E731
    return list(filter(is_kind, jax.tree.leaves(state, is_leaf=is_kind)))


def states_with_moments(state: Any) -> list[Any]:
    """Returns the states of `scale_by_adam`, `scale_by_amsgrad` and `scale_by_adamax`."""
    found = states_of(WITH_MOMENTS, state)
    if not found:
        raise ValueError(
            f"found no state of scale_by_adam, scale_by_amsgrad or scale_by_adamax in "
            f"{type(state).__name__}. A checkpoint restored without a target loses its types: "
            "restore it onto a state from init."
        )
    return found


def only_state(kind: type[T], wrapper: str, state: Any) -> T:
    """Returns the state of this kind in an optimizer's state, if there is exactly one."""
    found = states_of(kind, state)
    if len(found) != 1:
        raise ValueError(
            f"expected one {wrapper} state, found {len(found)} in {type(state).__name__}. Pass "
            f"the state of an optimizer that {wrapper} wraps."
        )
    return found[0]


def map_states(
    function: Callable[[T], Any], kind: type[T] | tuple[type[T], ...], state: Any
) -> Any:
    """Returns a state with a function applied to all states of a kind, at any depth."""
    is_kind = lambda x: isinstance(x, kind)  # noqa: E731
    return jax.tree.map(lambda x: function(x) if is_kind(x) else x, state, is_leaf=is_kind)


def applied(params: Any, updates: Any) -> Any:
    """Returns parameters with their updates added. Where an update is None, the parameter stays."""
    return jax.tree.map(
        lambda p, u: p if u is None else optax.apply_updates(p, u),
        params,
        updates,
        is_leaf=is_none,
    )


def unaliased(result: T, *given: Any) -> T:
    """Returns a result with copies of those of its arrays that were given.

    Otherwise, donating one of the two to a jitted step would delete the other.
    """
    theirs = {id(x) for x in jax.tree.leaves(given)}
    copied = lambda x: jnp.copy(x) if isinstance(x, jax.Array) and id(x) in theirs else x  # noqa: E731
    return jax.tree.map(copied, result)


def leaves_of(
    state: Any, like: Any, is_leaf: Callable[[Any], bool] | None = is_none
) -> list[Stored]:
    """Returns the leaves of a state with moments, one for each leaf of the tree `like`.

    Raises ValueError, naming the path, where a tree of the state has another structure.
    """
    tree = like, jax.tree.structure(like, is_leaf=is_leaf)

    def flatten(name: str, moments: Any, tree: tuple[Any, Any] = tree) -> list[Any]:
        like, treedef = tree
        return flatten_up_to(treedef, like, moments, f"state.{name}")

    mu = flatten("mu", state.mu)
    columns = [flatten(name, getattr(state, name)) for name in state._fields[3:]]
    others = list(zip(*columns, strict=True)) if columns else [()] * len(mu)
    if isinstance(state.nu, Int8Moment):
        nu = flatten("nu.codes", state.nu.codes)
        plain = unboxed(like)
        tree = plain, jax.tree.structure(plain, is_leaf=is_leaf)
        scales = flatten("nu.scales", unboxed(state.nu.scales), tree)
        units = flatten("nu.units", unboxed(state.nu.units), tree)
        rows = [Rows(*row) for row in zip(scales, units, strict=True)]
    else:
        nu, rows = flatten("nu", state.nu), [Rows()] * len(mu)
    return [Stored(*leaf) for leaf in zip(mu, nu, others, rows, strict=True)]


def with_leaves(
    state: Any,
    leaves: Sequence[Stored],
    like: Any,
    *,
    int8: bool,
    is_leaf: Callable[[Any], bool] | None = is_none,
) -> Any:
    """Returns a state with other moments, in trees like `like`; in int8, nu is an `Int8Moment`."""
    unflatten = jax.tree.structure(like, is_leaf=is_leaf).unflatten
    nu = unflatten([leaf.nu for leaf in leaves])
    if int8:
        # The rows of a leaf are not in the leaf's box, which would shard them like the parameter.
        # Flax NNX puts them into boxes like that of the count.
        plain = jax.tree.structure(unboxed(like), is_leaf=is_leaf).unflatten
        box = jax.tree.structure(state.count)

        def rows_of(column: list[Any]) -> Any:
            return plain([None if x is None else box.unflatten([x]) for x in column])

        nu = Int8Moment(
            nu,
            rows_of([leaf.rows.scale for leaf in leaves]),
            rows_of([leaf.rows.unit for leaf in leaves]),
        )
    others = {
        name: unflatten([leaf.others[i] for leaf in leaves])
        for i, name in enumerate(state._fields[3:])
    }
    return state._replace(mu=unflatten([leaf.mu for leaf in leaves]), nu=nu, **others)


def per_leaf(name: str, prefix: Any, tree: Any, *, none_is_a_value: bool = False) -> list[Any]:
    """Returns the value that `prefix`, a tree prefix of `tree`, gives to each leaf of `tree`."""
    try:
        spread = jax.tree.map(
            lambda value, subtree: jax.tree.map(lambda _: value, subtree, is_leaf=is_none),
            prefix,
            tree,
            is_leaf=is_none,
        )
    except ValueError as error:
        kind, other = type(tree).__name__, type(prefix).__name__
        remedy = f" The parameters are in a {kind}, but {name} is in a {other}: use a {kind}."
        raise ValueError(
            f"{name} must be one value or a tree prefix of the parameters: {error}"
            f"{remedy if kind != other else ''}"
        ) from error
    values = jax.tree.leaves(spread, is_leaf=is_none)
    for i, leaf in enumerate(jax.tree.leaves(tree, is_leaf=is_none)):
        if values[i] is None and leaf is not None and not none_is_a_value:
            raise ValueError(
                f"{name} is None at {keystr(leaf_path(tree, i))}, which has a gradient. Pass a "
                "value for it."
            )
    return values


def mask_per_leaf(name: str, mask: Mask, params: Any) -> list[Any]:
    """Returns a mask's value for each parameter. A mask is a tree prefix, or a function to one."""
    values = per_leaf(name, mask(params) if is_function(node_types(params), mask) else mask, params)
    leaves = jax.tree.leaves(params, is_leaf=is_none)
    return [value for value, leaf in zip(values, leaves, strict=True) if leaf is not None]


def with_extra_args(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Returns a transformation whose update accepts extra arguments, and may drop them.

    That of `optax.MultiSteps` passes them on, although its type does not declare that.
    """
    kinds = [x.kind for x in inspect.signature(inner.update).parameters.values()]
    if inspect.Parameter.VAR_KEYWORD in kinds:
        return optax.GradientTransformationExtraArgs(inner.init, inner.update)
    return optax.with_extra_args_support(inner)


def leaves_beside(params: Any, tree: Any, name: str) -> list[Any]:
    """Returns what a tree has for each parameter: an array, perhaps in a box, or a `MaskedNode`.

    Raises ValueError, naming the path, where the trees have different structures.
    """
    plain = unboxed(params)
    spread = _spread(tree, plain)
    return flatten_up_to(jax.tree.structure(plain), plain, spread, name, of="parameters")


def _spread(tree: Any, like: Any) -> Any:
    """Returns a tree in which each leaf of a masked subtree has its own `MaskedNode`."""
    if is_masked(tree):
        return jax.tree.map(lambda _: tree, like)
    children, node = _opened(tree)
    like_children, like_node = _opened(like)
    if node != like_node or jax.tree_util.treedef_is_leaf(node):
        return tree
    return node.unflatten(map(_spread, children, like_children))


def gathered(tree: Any, like: list[Any]) -> Any:
    """Returns a tree with a `MaskedNode` for each subtree that has one in all of these trees."""
    if all(map(is_masked, like)):
        return like[0]
    children, node = _opened(tree)
    opened = [_opened(x) for x in like if not is_masked(x)]
    if jax.tree_util.treedef_is_leaf(node) or any(x != node for _, x in opened):
        return tree
    columns = zip(children, *(x for x, _ in opened), strict=True)
    return node.unflatten([gathered(child, list(column)) for child, *column in columns])


def _opened(tree: Any) -> tuple[list[Any], Any]:
    """Returns the children of a node, and the structure that puts them together again."""
    return jax.tree.flatten(tree, is_leaf=lambda x: x is not tree)


def unboxed(tree: Any, keep: Callable[[Any], bool] = lambda leaf: False) -> Any:
    """Returns a tree without the boxes that frameworks put around arrays.

    Flax has a box around each parameter that says how its axes are sharded (`nnx.Variable`,
    `nn.Partitioned`). An array of another shape in such a box, like the scales of rows, would be
    sharded like the parameter. A box is a node with one leaf in it, other than Python's own
    containers. Boxes of leaves to `keep` stay.
    """
    children, node = _opened(tree)
    if jax.tree_util.treedef_is_leaf(node):
        return tree
    is_box = len(children) == 1 and not isinstance(tree, list | tuple | Mapping)
    if is_box and jax.tree_util.treedef_is_leaf(jax.tree.structure(children[0])):
        return tree if keep(children[0]) else children[0]
    return node.unflatten([unboxed(child, keep) for child in children])

"""Where an optimizer's state lies on a mesh of devices."""

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, reshard

from adam_jax._checks import keystr
from adam_jax._state import mask_per_leaf
from adam_jax._types import Mask, is_masked


def state_shardings(
    optimizer: Any,
    params: Any,
    *,
    axis: str | None = None,
    layers: Mask = False,
) -> Any:
    """The sharding of every leaf of an optimizer's state.

    Moments and remainders are sharded as their parameters are, the scales of int8 moments as the
    rows they belong to; counts and whatever else belongs to no parameter is replicated. With
    `axis`, state is partitioned over that axis of the mesh as well, which is the first stage of
    ZeRO ([Rajbhandari et al., 2020](https://arxiv.org/abs/1910.02054)): parameters that are
    replicated over the axis, as in data-parallel training, have a state that is not. Of each leaf
    the first dimension that can be divided evenly is, one that is not divided yet if possible. (If
    that is the last one, the scales of int8 moments, one for each row, cost a small collective.) A
    leaf with no such dimension stays as its parameter is.

    JAX does the rest, if a jitted step is told that its new state is to be sharded so, and its
    parameters as they were: each device gets its part of the sum of the gradients
    (reduce-scatter), makes its part of the step, and parameters are gathered (all-gather).

    Args:
        optimizer: any optax gradient transformation, or chain of them; or what `row_sparse`
            returns, with a table for `params`.
        params: the parameters, with a `jax.sharding.NamedSharding` each: arrays, or
            `jax.ShapeDtypeStruct`s.
        axis: the name of a mesh axis.
        layers: which parameters are stacked over layers, as for `value_and_update`: their first
            dimension is not divided over `axis`, so that each device has its part of each layer.

    Returns:
        A tree shaped like the optimizer's state, of `jax.sharding.NamedSharding`.

    Raises:
        ValueError: for a parameter without a `NamedSharding`, naming its path, for parameters on
            more than one mesh, or for an axis that their mesh lacks.

    Examples:
        >>> import adam_jax, jax, jax.numpy as jnp, optax
        >>> from jax.sharding import NamedSharding, PartitionSpec
        >>> mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
        >>> replicated = NamedSharding(mesh, PartitionSpec())
        >>> params = jax.device_put(jnp.ones((256, 128)), replicated)
        >>> optimizer = adam_jax.adam(1e-3, mu_dtype="int8", nu_dtype="int8")
        >>> shardings = adam_jax.state_shardings(optimizer, params, axis="data")
        >>> tuple(shardings[0].mu.spec)
        ('data', None)
        >>> state = jax.jit(optimizer.init, out_shardings=shardings)(params)
        >>> def step(params, state, gradients):
        ...     updates, state = optimizer.update(gradients, state, params)
        ...     return optax.apply_updates(params, updates), state
        >>> step = jax.jit(step, donate_argnums=(0, 1), out_shardings=(replicated, shardings))
    """
    mesh = _mesh_of(params)
    if axis is not None and axis not in mesh.axis_names:
        raise ValueError(f"axis must be one of the mesh's {mesh.axis_names}, got {axis!r}.")

    stacked = jax.tree.structure(params).unflatten(mask_per_leaf("layers", layers, params))

    def of_leaf(leaf: Any, param: Any, stacked: bool) -> Any:
        if is_masked(leaf):
            return leaf
        parts = [None] * leaf.ndim
        if leaf.ndim == param.ndim:
            parts = [*param.sharding.spec, *parts][: leaf.ndim]
            if axis is not None:
                parts = _partitioned(parts, param.shape, mesh, axis, first=int(stacked))
            # Scales have rows in common with the parameter, but not what is in a row.
            same = map(operator.eq, leaf.shape, param.shape)
            parts = [part if yes else None for part, yes in zip(parts, same, strict=True)]
        elif leaf.shape == param.shape[: leaf.ndim]:  # one for each row, as of `row_sparse`
            parts = [*param.sharding.spec, *parts][: leaf.ndim]
        return NamedSharding(mesh, PartitionSpec(*parts))

    return optax.tree.map_params(
        optimizer,
        of_leaf,
        jax.eval_shape(optimizer.init, params),
        params,
        stacked,
        transform_non_params=lambda _: NamedSharding(mesh, PartitionSpec()),
        is_leaf=is_masked,
    )


def is_explicit(x: Any) -> bool:
    """Whether an array is on a mesh with explicit axes."""
    return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def other_sharding(x: Any, like: Any) -> NamedSharding | None:
    """Returns how `like` is sharded over explicit axes, or None if x is sharded so too.

    Along these JAX wants to be told where operands meet that lie in different places. Along others
    its compiler decides.
    """
    sharding = jax.typeof(like).sharding
    same = not is_explicit(like) or jax.typeof(x).sharding.spec == sharding.spec
    return None if same else sharding


def resharded(x: Any, like: Any) -> Any:
    """Returns an array sharded as another of its shape, over the explicit axes of their mesh."""
    sharding = other_sharding(x, like)
    return x if sharding is None else reshard(x, sharding)


def placed(x: Any, like: Any) -> Any:
    """Returns an array on the devices where another one of its shape was put."""
    if isinstance(like, Tracer):
        return resharded(x, like)
    sharding = getattr(like, "sharding", None)
    if sharding is None or not getattr(like, "committed", True):
        return x  # what nobody has put anywhere may be used beside arrays on any device
    return jax.device_put(x, sharding)


def divides_layers(x: Any) -> bool:
    """Whether the first axis of an array is divided over explicit axes of a mesh."""
    return is_explicit(x) and x.ndim > 0 and jax.typeof(x).sharding.spec[0] is not None


def varying(aval: Any) -> frozenset[Any]:
    """Returns the axes of a `jax.shard_map` over which an array of this type varies."""
    if hasattr(aval, "manual_axis_type"):  # since JAX 0.10
        return aval.manual_axis_type.varying
    return aval.vma


def zeros_of(aval: Any) -> jax.Array:
    """Returns zeros of a type: its shape and dtype, and where it lies."""
    zeros = jnp.zeros(aval.shape, aval.dtype)
    if AxisType.Explicit in aval.sharding.mesh.axis_types:
        zeros = reshard(zeros, aval.sharding)
    if axes := tuple(varying(aval)):
        pcast = getattr(jax.lax, "pcast", None)  # since JAX 0.9
        return pcast(zeros, axes, to="varying") if pcast else jax.lax.pvary(zeros, axes)  # pyright: ignore[reportAttributeAccessIssue]
    return zeros


def barrier(tree: Any) -> Any:
    """Returns arrays as they are, behind one `jax.lax.optimization_barrier`.

    In `jax.shard_map`, before JAX 0.11, all that goes through one would vary over the axes over
    which anything of it does.
    """
    leaves, treedef = jax.tree.flatten(tree)
    types = [varying(jax.typeof(x)) for x in leaves]
    for kind in set(types):
        places = [i for i, x in enumerate(types) if x == kind]
        behind = jax.lax.optimization_barrier([leaves[i] for i in places])
        for i, x in zip(places, behind, strict=True):
            leaves[i] = x
    return treedef.unflatten(leaves)


def _mesh_of(params: Any) -> Mesh | AbstractMesh:
    """The one mesh that all parameters are on."""
    meshes: set[Mesh | AbstractMesh] = set()
    for path, param in jax.tree_util.tree_leaves_with_path(params):
        sharding = getattr(param, "sharding", None)
        if not isinstance(sharding, NamedSharding):
            raise ValueError(
                f"parameter {keystr(path)} must have a NamedSharding, got {sharding}. Put the "
                "parameters on a mesh with jax.device_put first."
            )
        meshes.add(sharding.mesh)
    if len(meshes) != 1:
        raise ValueError(f"the parameters must be on one mesh, got {len(meshes)}.")
    return meshes.pop()


def _partitioned(
    parts: list[Any], shape: tuple[int, ...], mesh: Mesh | AbstractMesh, axis: str, first: int
) -> list[Any]:
    """The same partition, with a dimension divided by one more axis.

    It is the first that allows it, from dimension `first` on.
    """
    axes: list[tuple[str, ...]] = [
        () if part is None else part if isinstance(part, tuple) else (part,) for part in parts
    ]
    if any(axis in names for names in axes):
        return parts
    # First those that nothing divides yet: with two axes for one dimension, what meets the
    # parameter on explicit meshes would have to be resharded.
    for i in sorted(range(first, len(shape)), key=lambda i: len(axes[i])):
        divided = (*axes[i], axis)
        if shape[i] % math.prod(mesh.shape[name] for name in divided) == 0:
            return [*parts[:i], divided if axes[i] else axis, *parts[i + 1 :]]
    return parts

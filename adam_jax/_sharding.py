"""Places an optimizer's state on a mesh of devices."""

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import ShapedArray, Tracer
from jax.experimental.layout import Format, Layout
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
    """Returns the sharding of every leaf of an optimizer's state.

    Moments and remainders are sharded like their parameters, and the scales of int8 moments like
    the rows they belong to. Counts and everything else that belongs to no parameter are replicated.

    With `axis`, state is partitioned over that axis of the mesh as well: the first stage of
    ZeRO ([Rajbhandari et al., 2020](https://arxiv.org/abs/1910.02054)). In data-parallel training,
    for example, parameters are replicated over the axis while their state is not. Each leaf is
    divided along its first dimension that divides evenly, preferably one that nothing divides yet.
    (If that is the last dimension, the scales of int8 moments, one for each row, cost a small
    collective.) A leaf without such a dimension stays sharded like its parameter. State that
    `offload` keeps in host memory gets a sharding there.

    JAX does the rest if you give a jitted step these shardings for its new state, and the old ones
    for its parameters. Each device then gets its part of the sum of the gradients (reduce-scatter)
    and makes its part of the step, and the parameters are gathered (all-gather).

    Args:
        optimizer: any optax gradient transformation, or chain of them; or a `RowSparse`, with a
            table for `params`.
        params: the parameters, with a `jax.sharding.NamedSharding` each: arrays, or
            `jax.ShapeDtypeStruct`s.
        axis: the name of the mesh axis to divide the state over. None: no further axis.
        layers: which parameters are stacked over layers, for `value_and_update`: a tree of bools
            that is a prefix of the parameter tree, or a function from the parameters to one. `axis`
            does not divide their first dimension, so each device has its part of each layer.

    Returns:
        A tree shaped like the optimizer's state, of `jax.sharding.NamedSharding`. On a TPU, 8-bit
        arrays in host memory have a `jax.experimental.layout.Format` instead, with the sharding and
        a layout that a loop over layers can read. JAX accepts either.

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

    def of_param(leaf: Any, param: Any, stacked: bool) -> Any:
        return leaf if is_masked(leaf) else at(leaf, spec(leaf, param, stacked))

    def at(leaf: Any, spec: PartitionSpec) -> Any:
        sharding = NamedSharding(mesh, spec)
        return _in_host_memory(sharding, leaf) if in_host(leaf) else sharding

    def spec(leaf: Any, param: Any, stacked: bool) -> PartitionSpec:
        parts = [None] * leaf.ndim
        if leaf.ndim == param.ndim:
            parts = [*param.sharding.spec, *parts][: leaf.ndim]
            if axis is not None:
                parts = _partitioned(parts, param.shape, mesh, axis, first=int(stacked))
            # Scales share the rows of the parameter, but not the axis within a row.
            same = map(operator.eq, leaf.shape, param.shape)
            parts = [part if yes else None for part, yes in zip(parts, same, strict=True)]
        elif leaf.shape == param.shape[: leaf.ndim]:  # one number per row, as in `row_sparse`
            parts = [*param.sharding.spec, *parts][: leaf.ndim]
        return PartitionSpec(*parts)

    return optax.tree.map_params(
        optimizer,
        of_param,
        types_of(optimizer.init, params),
        params,
        stacked,
        transform_non_params=lambda leaf: at(leaf, PartitionSpec()),
        is_leaf=is_masked,
    )


def is_explicit(x: Any) -> bool:
    """Returns whether an array is on a mesh with explicit axes."""
    return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def other_sharding(x: Any, like: Any) -> NamedSharding | None:
    """Returns how `like` is sharded over explicit axes, or None if x is sharded alike.

    Along these axes JAX raises an error where operands with different shardings meet. Along others
    its compiler decides.
    """
    sharding = jax.typeof(like).sharding
    same = not is_explicit(like) or jax.typeof(x).sharding.spec == sharding.spec
    return None if same else sharding


def resharded(x: Any, like: Any) -> Any:
    """Returns an array sharded like another of its shape, over the explicit axes of their mesh."""
    sharding = other_sharding(x, like)
    return x if sharding is None else reshard(x, sharding)


def placed(x: Any, like: Any) -> Any:
    """Returns an array on the devices, or in the host memory, of another array of its shape."""
    x = in_memory_of(like, x)
    if isinstance(like, Tracer):
        return resharded(x, like)
    sharding = getattr(like, "sharding", None)
    if sharding is None or not getattr(like, "committed", True):
        return x  # an uncommitted array can be used with arrays on any device
    return jax.device_put(x, sharding)


def divides_layers(x: Any) -> bool:
    """Returns whether the first axis of an array is divided over explicit axes of a mesh."""
    return is_explicit(x) and x.ndim > 0 and jax.typeof(x).sharding.spec[0] is not None


def varying(aval: Any) -> frozenset[Any]:
    """Returns the axes of a `jax.shard_map` over which an array of this type varies."""
    if hasattr(aval, "manual_axis_type"):  # since JAX 0.10
        return aval.manual_axis_type.varying
    return aval.vma


def zeros_of(aval: Any) -> jax.Array:
    """Returns zeros of a type: its shape, its dtype and its place."""
    zeros = jnp.zeros(aval.shape, aval.dtype)
    if AxisType.Explicit in aval.sharding.mesh.axis_types:
        zeros = reshard(zeros, aval.sharding)
    if axes := tuple(varying(aval)):
        pcast = getattr(jax.lax, "pcast", None)  # since JAX 0.9
        return pcast(zeros, axes, to="varying") if pcast else jax.lax.pvary(zeros, axes)  # pyright: ignore[reportAttributeAccessIssue]
    return zeros


def types_of(function: Any, *args: Any) -> Any:
    """Returns the types of a function's results: shapes, dtypes and memory."""
    jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    return jax.tree.structure(shapes).unflatten(jaxpr.out_avals)


def in_host(x: Any) -> bool:
    """Returns whether an array, or one of this type, is in host memory."""
    aval = x if isinstance(x, ShapedArray) else jax.typeof(x)
    return aval.memory_space is jax.memory.Space.Host


def _in_host_memory(sharding: NamedSharding, leaf: Any) -> NamedSharding | Format:
    """Returns a sharding in host memory, with the layout that a loop can read without a copy."""
    sharding = sharding.with_memory_kind("pinned_host")
    mesh = sharding.mesh
    one_tpu = isinstance(mesh, Mesh) and [x.platform for x in mesh.devices.flat] == ["tpu"]
    if not one_tpu or leaf.dtype.itemsize > 1 or leaf.ndim < 3:
        return sharding
    # XLA tiles such arguments as (32, 128), and in a loop as (8, 128): it would copy whole stacks.
    # For arrays on several chips it accepts no other tiling.
    return Format(Layout(tuple(range(leaf.ndim)), tiling=((8, 128), (4, 1))), sharding)


def to_host(x: Any) -> Any:
    """Returns an array in host memory."""
    return jax.device_put(x, jax.memory.Space.Host)


def fetched(tree: Any) -> Any:
    """Returns arrays in device memory."""
    to_device = lambda x: jax.device_put(x, jax.memory.Space.Device) if in_host(x) else x  # noqa: E731
    return jax.tree.map(to_device, tree)


def in_memory_of(like: Any, x: Any) -> Any:
    """Returns x, moved to host memory if another array is there."""
    return to_host(x) if in_host(like) else x


def device_type(x: Any) -> Any:
    """Returns the type that an array would have in device memory."""
    aval = jax.typeof(x)
    return aval.update(memory_space=jax.memory.Space.Device) if in_host(x) else aval


def barrier(tree: Any) -> Any:
    """Returns arrays unchanged, behind one `jax.lax.optimization_barrier`.

    In `jax.shard_map`, before JAX 0.11, everything that goes through one barrier would vary over
    all axes over which any of it varies. So arrays that vary over different axes get different
    barriers.
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
    """Returns the one mesh that all parameters are on."""
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
        raise ValueError(
            f"the parameters must be on one mesh, got {len(meshes)}. Put them all on one with "
            "jax.device_put."
        )
    return meshes.pop()


def _partitioned(
    parts: list[Any], shape: tuple[int, ...], mesh: Mesh | AbstractMesh, axis: str, first: int
) -> list[Any]:
    """Returns the partition with a dimension divided by one more axis.

    It is the first dimension that allows this, from dimension `first` on.
    """
    axes: list[tuple[str, ...]] = [
        () if part is None else part if isinstance(part, tuple) else (part,) for part in parts
    ]
    if any(axis in names for names in axes):
        return parts
    # First the dimensions that nothing divides yet: with two axes for one dimension, arrays that
    # meet the parameter on explicit meshes would have to be resharded.
    for i in sorted(range(first, len(shape)), key=lambda i: len(axes[i])):
        divided = (*axes[i], axis)
        if shape[i] % math.prod(mesh.shape[name] for name in divided) == 0:
            return [*parts[:i], divided if axes[i] else axis, *parts[i + 1 :]]
    return parts

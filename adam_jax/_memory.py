"""Counts the memory that training needs for weights, gradients and optimizer state."""

# Annotations stay text: cloudpickle then has no types to pickle along with a function.
from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax.experimental.layout import Format
from jax.sharding import NamedSharding
from jax.tree_util import GetAttrKey, tree_leaves_with_path

from adam_jax._checks import check_leaves, keystr
from adam_jax._sharding import in_host, state_shardings, types_of
from adam_jax._state import mask_per_leaf
from adam_jax._types import KeyPath, Mask, is_masked

_SHOWN = 5  # of the parameters
_HOST = ("pinned_host", "unpinned_host")
_OTHER = "other"  # state that belongs to no parameter, such as counts
_OF_INT8 = {"codes": "nu", "units": "scales"}  # fields of `Int8Moment`


class ParameterMemory(NamedTuple):
    """Bytes that one parameter needs on one device.

    Attributes:
        path: its path in the tree of parameters.
        shape: the shape of the whole parameter, on all devices.
        dtype: the dtype of the parameter and of its gradient.
        weight: bytes of the parameter itself.
        gradient: bytes of its gradient.
        state: bytes of its optimizer state, on the device or in host memory.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    weight: int
    gradient: int
    state: int


class MemoryUsage(NamedTuple):
    """Bytes that weights, gradients and optimizer state need on one device. Print it for a table.

    Attributes:
        size: the number of elements of all parameters, on all devices.
        weights: bytes of the parameters.
        gradients: bytes of the gradients.
        state: bytes of each kind of optimizer state: `mu`, `nu`, `scales` (of int8 moments),
            `remainder`, the field's name in any other state, and `other`.
        host_state: the same for state in host memory.
        parameters: the parameters one by one, the largest first.
    """

    size: int
    weights: int
    gradients: int
    state: Mapping[str, int]
    host_state: Mapping[str, int]
    parameters: Sequence[ParameterMemory]

    @property
    def total(self) -> int:
        """Returns the bytes of device memory."""
        return self.weights + self.gradients + sum(self.state.values())

    def __str__(self) -> str:
        per_parameter = lambda size: f"{size / max(self.size, 1):.2f}"  # noqa: E731
        rows = [
            ("weights", self.weights),
            ("gradients", self.gradients),
            *self.state.items(),
            ("on each device", self.total),
            *((f"{kind}, in host memory", size) for kind, size in self.host_state.items()),
        ]
        kinds = _table(
            [f"{self.size:,} parameters", "bytes", "per parameter"],
            [(name, _readable(size), per_parameter(size)) for name, size in rows],
        )
        largest = _table(
            ["largest parameters", "dtype", "shape", "weight", "gradient", "state"],
            [
                (x.path, str(x.dtype), str(x.shape), *map(_readable, x[-3:]))
                for x in self.parameters[:_SHOWN]
            ],
        )
        return f"{kinds}\n\n{largest}"


def memory_usage(
    optimizer: Any,
    params: Any,
    *,
    shardings: Any = None,
    layers: Mask = False,
) -> MemoryUsage:
    """Counts the bytes that weights, gradients and optimizer state need on each device.

    It allocates nothing. Parameters can be `jax.ShapeDtypeStruct`s, as from `jax.eval_shape`, of a
    model that fits on no device. Activations are not counted: `memory_analysis()` of
    `step.lower(...).compile()` has the compiler's figures for a whole step.

    Args:
        optimizer: any optax gradient transformation; or a `RowSparse`, with a table for `params`.
        params: the parameters: arrays, or `jax.ShapeDtypeStruct`s. If each has a
            `jax.sharding.NamedSharding`, a device holds its part of them.
        shardings: the shardings of the state, as from `state_shardings`, if they differ from those
            of the parameters. With `axis` for ZeRO-1, gradients count as divided like the state, as
            after a reduce-scatter. State with a host's `memory_kind` is counted separately.
        layers: which parameters are stacked over layers, for `value_and_update`, which holds the
            gradients of one layer at a time: a tree of bools that is a prefix of the parameter
            tree, or a function from the parameters to one. False: none.

    Returns:
        A `MemoryUsage`. `print` shows it as a table.

    Raises:
        TypeError: for a parameter of integer dtype, naming its path.

    Examples:
        >>> import adam_jax, jax, jax.numpy as jnp
        >>> params = {"w": jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)}
        >>> moments = adam_jax.adamw(1e-3, mu_dtype="int8", nu_dtype="int8")
        >>> print(adam_jax.memory_usage(adam_jax.master_weights(moments, "int8"), params))
        16,777,216 parameters    bytes  per parameter
        weights                33.6 MB           2.00
        gradients              33.6 MB           2.00
        remainder              16.8 MB           1.00
        mu                     16.8 MB           1.00
        nu                     16.8 MB           1.00
        scales                 32.8 kB           0.00
        other                      8 B           0.00
        on each device          117 MB           7.00
        <BLANKLINE>
        largest parameters     dtype         shape   weight  gradient    state
        ['w']               bfloat16  (4096, 4096)  33.6 MB   33.6 MB  50.4 MB
    """
    check_leaves("parameter", params)
    stacked = mask_per_leaf("layers", layers, params)
    leaves, tree = jax.tree.flatten(params)
    paths = [path for path, _ in tree_leaves_with_path(params)]
    state = types_of(optimizer.init, params)
    if shardings is None and leaves and all(isinstance(_place(p), NamedSharding) for p in leaves):
        shardings = state_shardings(optimizer, params)
    parts = _parts(optimizer, state, shardings, tree, paths)
    by_param = collections.defaultdict[int | None, list[_Part]](list)
    for part in parts:
        by_param[part.param].append(part)

    rows = []
    for i, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        elements = _elements(leaf.shape, _place(leaf))
        of_state = by_param[i]
        # A reduce-scatter leaves each device the part of a gradient for which it has the moments.
        divided = min([elements, *(x.elements for x in of_state if x.shape == leaf.shape)])
        if stacked[i]:
            divided = -(-divided // leaf.shape[0])
        rows.append(
            ParameterMemory(
                keystr(path),
                leaf.shape,
                leaf.dtype,
                elements * leaf.dtype.itemsize,
                divided * leaf.dtype.itemsize,
                sum(part.bytes for part in of_state),
            )
        )
    on_device: dict[str, int] = {}
    on_host: dict[str, int] = {}
    for part in sorted(parts, key=lambda part: part.kind == _OTHER):
        sizes = on_host if part.in_host else on_device
        sizes[part.kind] = sizes.get(part.kind, 0) + part.bytes
    return MemoryUsage(
        size=sum(leaf.size for leaf in leaves),
        weights=sum(row.weight for row in rows),
        gradients=sum(row.gradient for row in rows),
        state=on_device,
        host_state=on_host,
        parameters=sorted(rows, key=lambda row: -(row.weight + row.gradient + row.state)),
    )


class _Part(NamedTuple):
    """One device's part of a leaf of the state."""

    kind: str
    shape: tuple[int, ...]  # of the leaf
    elements: int  # of the part
    bytes: int
    in_host: bool
    param: int | None  # which parameter it belongs to


def _parts(
    optimizer: Any, state: Any, shardings: Any, tree: Any, paths: Sequence[KeyPath]
) -> list[_Part]:
    """Returns one device's part of each leaf of a state, given as types."""
    found, state_tree = jax.tree_util.tree_flatten_with_path(state)
    places = [None] * len(found) if shardings is None else state_tree.flatten_up_to(shardings)
    places = [x.sharding if isinstance(x, Format) else x for x in places]
    params = optax.tree.map_params(
        optimizer,
        lambda i, param: i if is_masked(i) else param,
        state_tree.unflatten(range(len(found))),
        tree.unflatten(range(len(paths))),
        transform_non_params=lambda _: None,
        is_leaf=is_masked,
    )
    parts = []
    for (path, leaf), place, param in zip(
        found, places, state_tree.flatten_up_to(params), strict=True
    ):
        param = None if param is None else int(param)  # it may be in a box
        kind = _OTHER if param is None else _kind(path, paths[param])
        elements = _elements(leaf.shape, place)
        hosted = in_host(leaf) if place is None else place.memory_kind in _HOST
        size = elements * leaf.dtype.itemsize
        parts.append(_Part(kind, leaf.shape, elements, size, hosted, param))
    return parts


def _kind(path: KeyPath, param: KeyPath) -> str:
    """Returns the name of the state's field that holds a tree like the parameters."""
    end = len(path) - len(param)
    if path[end:] != param:  # the parameter may be in a box, which per-row state is not
        end += 1
    names = [str(key.name) for key in path[:end] if isinstance(key, GetAttrKey)]
    return _OF_INT8.get(names[-1], names[-1]) if names else _OTHER


def _place(x: Any) -> Any:
    return getattr(x, "sharding", None)


def _elements(shape: tuple[int, ...], place: Any) -> int:
    """Returns how many elements of an array one device has."""
    return math.prod(shape if place is None else place.shard_shape(shape))


def _readable(size: int) -> str:
    """Returns a number of bytes with three digits, in decimal units."""
    if size < 1000:
        return f"{size} B"
    scaled, units = size / 1000, iter(["kB", "MB", "GB", "TB", "PB"])
    unit = next(units)
    while scaled >= 999.5:
        scaled, unit = scaled / 1000, next(units)
    digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
    return f"{scaled:.{digits}f} {unit}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns lines of aligned columns, the first of which is text."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for first, *others in (header, *rows):
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)

"""Updates tables in which few rows get a gradient, such as embeddings."""

# Annotations stay text: cloudpickle then has no types to pickle along with a function.
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Complex, Float, Int32, Integer

from adam_jax._checks import check_leaves, check_param, check_state, keystr
from adam_jax._master_weights import MasterWeightsState
from adam_jax._moments import arithmetic_dtype
from adam_jax._replay import Missed
from adam_jax._sharding import barrier, in_host, is_explicit
from adam_jax._state import WITH_MOMENTS, states_of, states_with_moments, with_extra_args
from adam_jax._storage import zeros_along

Table = Float[Array, "vocabulary *row"] | Complex[Array, "vocabulary *row"]
Vectors = Float[Array, "*ids_row"] | Complex[Array, "*ids_row"]
Ids = Integer[Array, "*ids"]
Rows = Int32[Array, " n"]

# States of optimizers that keep nothing for a row except moments and remainders.
_ROW_BY_ROW = (
    optax.EmptyState,
    optax.ScaleByScheduleState,
    optax.MaskedState,
    optax.ApplyIfFiniteState,
    optax.InjectHyperparamsState,
    optax.InjectStatefulHyperparamsState,
    *WITH_MOMENTS,
    MasterWeightsState,
)


class RowSparse(NamedTuple):
    """The functions that `row_sparse` returns, pure functions of a table and its state.

    Attributes:
        init: `init(table)` returns the state.
        lookup: `lookup(ids, table, state)` returns the rows that ids name.
        update: `update(ids, gradients, table, state)` returns the table and the state after a step.
        catch_up: `catch_up(table, state)` returns them with every row up to date.
    """

    init: Callable[[Any], Any]
    lookup: Callable[[Any, Any, Any], Any]
    update: Callable[[Any, Any, Any, Any], tuple[Any, Any]]
    catch_up: Callable[[Any, Any], tuple[Any, Any]]


class RowSparseState(NamedTuple):
    """State of `row_sparse(optimizer, exact=True)`.

    Attributes:
        inner_state: the state of the optimizer, shaped like `optimizer.init(table)`; its count is
            that of all steps.
        last_step: int32, shape (vocabulary,): the step that each row has reached.
    """

    inner_state: Any
    last_step: Any


def row_sparse(optimizer: optax.GradientTransformation, exact: bool = False) -> RowSparse:
    r"""Trains a table, such as embeddings, by the rows that each step uses.

    Differentiating `table[ids]` gives a gradient as large as the table, nearly all of it 0. This
    step takes the gradients of the looked-up vectors instead, so its time and memory grow with
    their number. Jit the step and donate table and state: both are then updated in place.

        rows = adam_jax.row_sparse(adam_jax.adam(1e-3))
        state = rows.init(table)                                   # table: (vocabulary, width)

        @functools.partial(jax.jit, donate_argnums=(1, 2))
        def step(ids, table, state):
            vectors = rows.lookup(ids, table, state)               # (*ids.shape, width)
            loss, gradients = jax.value_and_grad(loss_of)(vectors)
            table, state = rows.update(ids, gradients, table, state)
            return loss, table, state

    "Adam on sparse gradients" can mean two different things:

    - **Lazy**, the default: a row that no id names keeps its parameters and its moments. All rows
      share one step count. `torch.optim.SparseAdam`, TensorFlow's LazyAdam and the SparseCore of
      TPUs do the same. The state is that of `optimizer.init(table)`, so row-sparse steps and steps
      of the whole table can alternate.
    - **Exact** (`exact=True`): the numbers of Adam on the gradient of the whole table, up to
      rounding. In Adam every row moves at every step: a row without a gradient continues along its
      first moment, which decays as $\beta_1^j$, and weight decay shrinks it. Each row stores the
      step that it has reached, and `lookup` and `update` make up for the steps since. They sum up
      the first $K$ of these, after which less than $10^{-8}$ of the first step is left:
      $K = \log 10^{-8} / \log(\beta_1 / \sqrt{\beta_2})$, 176 with the default betas. (For
      `amsgrad` the quotient is $\beta_1$, for `adamax` it is $\beta_1 / \beta_2$.) `catch_up`
      brings all rows up to date, for a checkpoint of the table, or to continue with steps of the
      whole table on `state.inner_state`.

    **Ids out of range.** Concrete ids out of range raise an error. For traced ids, in a jitted
    function, `lookup` returns zeros for them, negative ones too, and `update` ignores them, so they
    can pad a batch. Gradients of the same id are summed, in float32 (float64 for float64).

    The optimizer sees the rows of a step as if they were the whole parameter. Moments may have any
    storage format. A row draws the same random bits as in an update of the whole table. On a mesh,
    table and state may be divided by rows or columns. Results come in the order of the arguments,
    because JAX reuses donated arrays in that order.

    Args:
        optimizer: `adam` or any variant of it; `master_weights` of one, for tables in 16 bits; a
            chain of one with transformations that have no state; or one in
            `optax.inject_hyperparams` or `optax.apply_if_finite`. With `exact=True`: one of
            `adam_jax`'s optimizers, not a `scale_by_...`, with eps_root = 0, or `master_weights` of
            one.
        exact: whether rows that no id names move as Adam moves them.

    Returns:
        Four functions, as a `RowSparse`: `init(table)`, `lookup(ids, table, state)`,
        `update(ids, gradients, table, state)` and `catch_up(table, state)`. The table has shape
        (vocabulary, width), or more axes. Ids are integers of any shape. `lookup` returns vectors
        in the table's dtype, and gradients have the vectors' shape. `update` and `catch_up` return
        the table and the state. Differentiate with respect to the vectors: with `exact=True`,
        `lookup` has no derivative.

    Raises:
        ValueError: for an optimizer that keeps anything else for each row (`optax.MultiSteps`,
            `average_params`); for concrete ids out of range; for gradients or a state that do not
            fit the table. With `exact=True` for traced betas, eps or rates, for b1 >= sqrt(b2),
            with which a row would never come to rest, and for a constant
            learning_rate * weight_decay >= 1.
        TypeError: for ids that are not integers, and a table that is no array of a real or complex
            floating dtype.

    Examples:
        >>> import adam_jax, jax.numpy as jnp
        >>> rows = adam_jax.row_sparse(adam_jax.adam(0.1))
        >>> table = jnp.zeros((1000, 2))
        >>> state = rows.init(table)
        >>> ids = jnp.array([7, 7, 3])
        >>> gradients = jnp.array([[1.0, 1.0], [1.0, -3.0], [0.0, 5.0]])
        >>> table, state = rows.update(ids, gradients, table, state)
        >>> rows.lookup(jnp.array([3, 7, 8]), table, state)
        Array([[ 0. , -0.1],
               [-0.1,  0.1],
               [ 0. ,  0. ]], dtype=float32)
    """
    optimizer = with_extra_args(optimizer)

    def init(table: Any) -> Any:
        _check_table(table)
        state = optimizer.init(table)
        _check_row_by_row(state)
        _check_memory(state)
        if not exact:
            return state
        zero = lambda x: zeros_along(x, x.shape[:1], jnp.int32)  # noqa: E731
        state = RowSparseState(state, jax.tree.map(zero, table))
        if jax.tree.leaves(table):
            jax.eval_shape(catch_up, table, state)  # raises if the optimizer does not support it
        return state

    def lookup(ids: Any, table: Any, state: Any) -> Any:
        _check_table(table)
        if exact:
            check_state(RowSparseState, state)
            _check_rows(state, table)
        ids = _checked_ids(ids, table)
        return _in_auto_axes(_lookup, _sharding_of_vectors(ids, table), (ids, table, state))

    @jax.jit
    def _lookup(ids: Ids, table: Table, state: Any) -> Vectors:
        flat = _in_int32(ids, table.shape[0]).reshape(-1)
        if exact:
            rows = _gathered(flat, *_not_differentiated((table, state)))
            found, _ = replayed(*rows, flat, table.shape[0])
        else:
            found, _ = _gathered(flat, table, ())
        return found.reshape(ids.shape + table.shape[1:])

    def update(ids: Any, gradients: Any, table: Any, state: Any) -> tuple[Any, Any]:
        _check_table(table)
        if exact:
            check_state(RowSparseState, state)
        _check_row_by_row(state.inner_state if exact else state)
        _check_rows(state, table)
        ids = _checked_ids(ids, table)
        like = jax.ShapeDtypeStruct(ids.shape + table.shape[1:], table.dtype)
        check_param(tuple, gradients, like)
        return _in_auto_axes(_update, _shardings((table, state)), (ids, gradients, table, state))

    @jax.jit
    def _update(ids: Ids, gradients: Vectors, table: Table, state: Any) -> tuple[Table, Any]:
        rows, sums = _summed(ids, gradients, table)
        # Behind a barrier: XLA for TPU would make the gather a part of the scatter, for which it
        # then copies the table.
        row, row_state = barrier(_gathered(rows, table, state))
        last_step = None
        if exact:
            row, (row_state, last_step) = replayed(row, row_state, rows, table.shape[0])
        updates, row_state = optimizer.update(sums, row_state, row, positions=[rows])
        row = _applied(row, updates)
        if last_step is not None:
            row_state = RowSparseState(row_state, last_step + _one_after(sums))
        return _scattered(rows, (table, state), (row, row_state))

    def catch_up(table: Any, state: Any) -> tuple[Any, Any]:
        _check_table(table)
        if not exact:
            return table, state
        check_state(RowSparseState, state)
        _check_rows(state, table)
        return _in_auto_axes(_catch_up, _shardings((table, state)), (table, state))

    @jax.jit
    def _catch_up(table: Table, state: RowSparseState) -> tuple[Table, RowSparseState]:
        vocabulary = table.shape[0]
        return replayed(table, state, jnp.arange(vocabulary, dtype=jnp.int32), vocabulary)

    def replayed(
        table: Any, state: RowSparseState, rows: Rows, vocabulary: int
    ) -> tuple[Any, RowSparseState]:
        """Returns a table and its state, or rows of them, after the steps that each row missed."""
        inner, last_step = state
        _check_whole_step(inner)
        count = states_with_moments(inner)[0].count
        missed = Missed(jnp.where(rows < vocabulary, count - last_step, 0))
        # The last missed step is the last step that the optimizer made: it draws the same bits.
        before = jax.tree.map(lambda x: x - 1 if x.dtype == jnp.int32 else x, inner)
        no_gradient = jnp.zeros_like(table, arithmetic_dtype(table.dtype))
        updates, new = optimizer.update(no_gradient, before, table, positions=[rows], missed=missed)
        if not missed.made:
            raise _no_whole_step()
        none_missed = missed.steps == 0

        def chosen(old: Any, new: Any) -> Any:
            if old.ndim == 0:
                return old
            return jnp.where(none_missed.reshape(-1, *[1] * (old.ndim - 1)), old, new)

        table = chosen(table, _applied(table, updates))
        last_step = last_step + missed.steps
        return table, RowSparseState(jax.tree.map(chosen, inner, new), last_step)

    return RowSparse(init, lookup, update, catch_up)


def _in_int32(ids: Ids, vocabulary: int) -> Ids:
    """Returns ids as int32, with the number of rows for ids out of range."""
    if ids.dtype.itemsize < 4:
        ids = ids.astype(jnp.int32)
    inside = (ids >= 0) & (ids < np.array(vocabulary, ids.dtype))
    return jnp.where(inside, ids.astype(jnp.int32), np.int32(vocabulary))


def _summed(ids: Ids, gradients: Vectors, table: Table) -> tuple[Rows, Vectors]:
    """Returns the distinct rows that ids name, ascending, and the sum of the gradients of each.

    There are as many as ids, but no more than the table has rows. Surplus entries are rows beyond
    the end of the table with gradients of 0.
    """
    vocabulary, *row = table.shape
    size = min(ids.size, vocabulary)
    ids = _in_int32(ids, vocabulary).reshape(-1)
    order = jnp.argsort(ids)
    ids = ids[order]
    # Ids out of range come last, and are dropped if no place is left for them.
    places = jnp.cumsum(jnp.diff(ids, prepend=ids[:1]) > 0, dtype=jnp.int32)
    wide = gradients.reshape(-1, *row).astype(arithmetic_dtype(gradients.dtype))
    sums = jax.ops.segment_sum(wide[order], places, size, indices_are_sorted=True)
    rows = jax.ops.segment_min(ids, places, size, indices_are_sorted=True)
    beyond = np.int32(vocabulary) + jnp.arange(size, dtype=jnp.int32)
    return jnp.where(rows < vocabulary, rows, beyond), sums


def _applied(table: Any, updates: Any) -> Any:
    """Returns a table, or rows of it, with updates added, which may have a wider dtype."""
    with jax.numpy_dtype_promotion("standard"):
        return optax.apply_updates(table, updates)


def _gathered(rows: Rows, table: Table, state: Any) -> tuple[Any, Any]:
    """Returns rows of a table and of its state, with 0 beyond the end."""
    gather = lambda x: x.at[rows].get(mode="fill", fill_value=0) if x.ndim else x  # noqa: E731
    return jax.tree.map(gather, (table, state))


def _one_after(sums: Vectors) -> jax.Array:
    """Returns int32 ones, one for each row, which the compiler believes to depend on the gradients.

    The new last step of a row depends on no gradient. XLA for CPU would see no reason to write it
    after a lookup has read it, and would copy the whole array, at a cost that grows with its size.
    """
    size, *row = sums.shape
    first = jnp.real(sums.reshape(size, math.prod(row))[:, :1].sum(axis=1)).astype(jnp.float32)
    magnitude = jax.lax.bitcast_convert_type(first, jnp.int32) & np.int32(2**31 - 1)
    return 1 + jax.lax.shift_right_logical(magnitude, np.int32(31))


def _scattered(rows: Rows, old: Any, new: Any) -> Any:
    """Returns table and state with some rows replaced; rows are ascending and distinct."""

    def scatter(old: Any, new: Any) -> Any:
        if old.ndim == 0:
            return new
        # XLA for TPU takes ten times as long to compile ascending scatters of 8 or 16 bits.
        ascending = old.dtype.itemsize >= 4
        return old.at[rows].set(new, mode="drop", indices_are_sorted=ascending, unique_indices=True)

    return jax.tree.map(scatter, old, new)


@jax.custom_jvp
def _not_differentiated(tree: Any) -> Any:
    return tree


@_not_differentiated.defjvp
def _(primals: Any, tangents: Any) -> Any:
    raise TypeError(
        "lookup has no derivative with exact=True. Look the vectors up first, and differentiate "
        "with respect to them: jax.grad(loss_of)(rows.lookup(ids, table, state))."
    )


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.typeof(x).sharding, tree)


def _sharding_of_vectors(ids: Any, table: Any) -> NamedSharding:
    """Returns how vectors are divided over explicit axes: like their ids, and like rows."""
    of_ids, of_table = _shardings((ids, table))
    used = {name for part in of_ids.spec for name in (part if isinstance(part, tuple) else [part])}
    of_row = [
        None if used.intersection(part if isinstance(part, tuple) else [part]) else part
        for part in of_table.spec[1:]
    ]
    mesh = of_ids.mesh if of_table.mesh.empty else of_table.mesh
    return NamedSharding(mesh, PartitionSpec(*of_ids.spec, *of_row))


def _in_auto_axes(function: Callable[..., Any], shardings: Any, args: Any) -> Any:
    """Calls a function inside which the compiler decides where on a mesh everything lies.

    Along explicit axes, JAX would need that for each gather and scatter.
    """
    meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(args) if is_explicit(x)]
    if not meshes:
        return function(*args)
    on_mesh = lambda x: NamedSharding(meshes[0], PartitionSpec()) if x.mesh.empty else x  # noqa: E731
    out = jax.tree.map(on_mesh, shardings)
    return jax.sharding.auto_axes(function, out_sharding=out)(*args)


def _checked_ids(ids: Any, table: Any) -> Any:
    """Returns ids as an array. Raises unless they are integers and, if concrete, in range."""
    if not hasattr(ids, "dtype"):
        ids = np.asarray(ids) if np.size(ids) else np.zeros(np.shape(ids), np.int32)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"ids must be integers, got dtype {ids.dtype}.")
    vocabulary = table.shape[0]
    if ids.size + vocabulary >= 2**31:
        raise ValueError(
            f"a table of {vocabulary} rows and {ids.size} ids need numbers of more than 31 bits. "
            "Divide the table into several."
        )
    if isinstance(ids, Tracer) or not getattr(ids, "is_fully_addressable", True):
        return ids
    known = np.asarray(ids)  # of NumPy: no tracer in a jitted function either
    outside = np.argwhere((known < 0) | (known >= vocabulary))
    if len(outside):
        place = tuple(map(int, outside[0]))
        raise ValueError(
            f"ids{list(place)} is {known[place]}, but the table has {vocabulary} rows. Pass ids "
            f"from 0 to {vocabulary - 1}. (In a jitted function, where ids are traced, those out "
            "of range are ignored.)"
        )
    return jnp.asarray(ids)


def _check_table(table: Any) -> None:
    leaves, tree = jax.tree.flatten(table)
    if table is not None and not leaves:
        return  # a placeholder, from which optax finds out what the state consists of
    if table is None or not (jax.tree_util.treedef_is_leaf(tree) and hasattr(table, "shape")):
        raise TypeError(
            f"the table must be one array, got {type(table).__name__}. Each table of a model has "
            "its own state: jax.tree.map(rows.init, tables) makes them."
        )
    check_leaves("table", table)
    if table.ndim < 2:
        raise ValueError(
            f"a table must have shape (vocabulary, width), got {table.shape}. For one number in "
            "each row pass table[:, None]."
        )


def _check_row_by_row(state: Any) -> None:
    """Raises ValueError if an optimizer keeps more of a row than moments and remainders."""
    if type(state) in (tuple, list, dict):
        for x in state.values() if isinstance(state, dict) else state:
            _check_row_by_row(x)
        return
    if not isinstance(state, _ROW_BY_ROW):
        raise ValueError(
            f"row_sparse has no rule for {type(state).__name__}: the state of a row without a "
            "gradient must stay unchanged. Pass adam or a variant of it, perhaps in "
            "master_weights, or in a chain with transformations that have no state. To accumulate "
            "gradients, join ids and gradients of several batches instead of using "
            "optax.MultiSteps."
        )
    _check_row_by_row(getattr(state, "inner_state", ()))


def _check_memory(state: Any) -> None:
    """Raises ValueError for a state in host memory."""
    if any(map(in_host, jax.tree.leaves(state))):
        raise ValueError(
            "row_sparse cannot take single rows out of host memory. Pass the optimizer without "
            "offload."
        )


def _check_rows(state: Any, table: Any) -> None:
    """Raises ValueError unless a state has as many rows as the table."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if leaf.ndim and leaf.shape[0] != table.shape[0]:
            raise ValueError(
                f"state{keystr(path)} has shape {leaf.shape}, but the table has {table.shape[0]} "
                "rows. Pass the state that init returned for this table."
            )


def _check_whole_step(state: Any) -> None:
    """Raises ValueError unless a state can be that of an optimizer of adam_jax."""
    while isinstance(state, MasterWeightsState):
        state = state.inner_state
    is_step = isinstance(state, tuple) and isinstance([*state, None][0], WITH_MOMENTS)
    if not is_step or len(states_of(WITH_MOMENTS, state)) != 1:
        raise _no_whole_step()


def _no_whole_step() -> ValueError:
    return ValueError(
        "exact=True needs adam_jax's own adam, adamw, nadam, nadamw, amsgrad, adamax or adamaxw, "
        "or master_weights of one, because it makes up for missed steps by their formulas. Instead "
        "of optax.inject_hyperparams, whose past rates are unknown, pass a schedule."
    )

"""Row-sparse steps on random tables, ids and values of every class change only what they may."""

import functools
from typing import Any

import fuzz
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from covering import first
from optimizers import INT8, ROWS
from trees import assert_same_bits

import adam_jax

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("standard_promotion")]

WHOLE_STEPS = [row for row in ROWS if row.takes("learning_rate") and row.name != "average_params"]
CLASSES = [name for name in fuzz.BASIC if name not in ("largest", "any bits")]
SHAPES = [(1, 1), (2, 3), (5, 2, 2), (40, 33), (130, 32), (300, 1), (70, 64)]
SIZES = [(), (0,), (1,), (3, 2), (64,)]
ID_DTYPES = ["int8", "uint8", "int16", "int32", "uint32"]


def draw(rng, choices):
    return choices[rng.integers(len(choices))]


def draw_optimizer(rng, low):
    row = draw(rng, WHOLE_STEPS)
    optimizer = row.make(b1=draw(rng, [0.0, 0.5, 0.9]), b2=draw(rng, [0.95, 0.999]))
    remainder = draw(rng, ["none", "int8", "int16", "float32"])
    return adam_jax.master_weights(optimizer, remainder) if low else optimizer


def rows_of(tree, table):
    """Returns a tree's values for each row of a table, as bytes in a matrix of one line per row."""
    leaves = [np.asarray(x) for x in jax.tree.leaves(tree) if x.ndim]
    lines = [x.reshape(len(table), -1) for x in leaves]
    return np.concatenate([np.ascontiguousarray(x).view(np.uint8) for x in lines if x.size], axis=1)


@pytest.mark.parametrize("number", first(3, range(24)))
def test_random_tables_change_only_in_named_rows(number):
    rng = np.random.default_rng([11, number])
    low, exact = rng.random() < 0.4, rng.random() < 0.4
    dtype = draw(rng, ["bfloat16", "float16"]) if low else "float32"
    optimizer = draw_optimizer(rng, low)
    rows = adam_jax.row_sparse(optimizer, exact)
    shape = draw(rng, SHAPES)
    table = jnp.asarray(fuzz.values(rng, "moderate", shape, dtype))
    state = rows.init(table)
    update, lookup, catch_up = map(jax.jit, (rows.update, rows.lookup, rows.catch_up))
    spoilt = np.zeros(len(table), bool)
    for step in range(1, 7):
        id_dtype = draw(rng, ID_DTYPES)
        info = np.iinfo(id_dtype)
        low_id, high_id = max(info.min, -3), min(info.max, len(table) + 3)
        ids = rng.integers(low_id, high_id + 1, draw(rng, SIZES)).astype(id_dtype)
        gradients = fuzz.values(rng, draw(rng, CLASSES), (*ids.shape, *shape[1:]), dtype)
        inside = (ids.astype(int) >= 0) & (ids.astype(int) < len(table))
        if step == 5 and ids.size:  # one NaN, also for an id out of range
            gradients = np.array(gradients)
            gradients.reshape(ids.size, -1)[0, 0] = np.nan
            spoilt[ids.reshape(-1)[:1][inside.reshape(-1)[:1]].astype(int)] = True
        named = np.unique(ids[inside].astype(int))
        others = np.setdiff1d(np.arange(len(table)), named)
        before, before_state = table, state
        table, state = update(jnp.asarray(ids), jnp.asarray(gradients), table, state)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), (table, state)) == jax.tree.map(
            lambda x: (x.shape, x.dtype), (before, before_state)
        )
        np.testing.assert_array_equal(
            rows_of((table, state), table)[others], rows_of((before, before_state), table)[others]
        )
        inner: Any = state.inner_state if exact else state
        [count] = {int(x) for x in jax.tree.leaves(inner) if x.shape == () and x.dtype == jnp.int32}
        assert count == step
        found = np.asarray(lookup(jnp.asarray(ids), table, state), np.float64)
        assert np.all(found[~inside] == 0)
        finite = np.isfinite(np.asarray(table, np.float64)).reshape(len(table), -1).all(axis=1)
        assert np.all(finite | spoilt)
        if exact:
            caught_up, caught_up_state = catch_up(table, state)
            np.testing.assert_array_equal(caught_up_state.last_step, step)
            assert_same_bits(caught_up[named], table[named])
            np.testing.assert_array_equal(
                found[inside], np.asarray(caught_up)[ids[inside].astype(int)]
            )
            moved = np.isfinite(np.asarray(caught_up, np.float64)).reshape(len(table), -1)
            assert np.all(moved.all(axis=1) | spoilt)


@pytest.mark.parametrize("number", first(2, range(6)))
def test_random_steps_agree_with_steps_of_the_whole_table(number):
    """Named rows agree if the state before is the same, in float32 and in int8."""
    rng = np.random.default_rng([12, number])
    optimizer = adam_jax.adamw(0.01, **INT8) if number % 2 else draw_optimizer(rng, low=False)
    rows = adam_jax.row_sparse(optimizer)
    table = jnp.asarray(fuzz.values(rng, "moderate", (150, 32), "float32"))
    state = rows.init(table)

    @functools.partial(jax.jit)
    def whole(ids, gradients, table, state):
        gradient = jnp.zeros_like(table).at[ids].add(gradients)
        updates, state = optimizer.update(gradient, state, table)
        return optax.apply_updates(table, updates), state

    for name in CLASSES:
        ids = jnp.asarray(rng.integers(0, 150, 40))
        gradients = jnp.asarray(fuzz.values(rng, name, (40, 32), "float32"))
        expected = whole(ids, gradients, table, state)
        table, state = jax.jit(rows.update)(ids, gradients, table, state)
        # A sum of huge gradients may be infinite in both.
        np.testing.assert_allclose(table[ids], expected[0][ids], rtol=0, atol=1e-6)

"""Row-sparse steps: lazy ones against their definition, exact ones against Adam on all rows."""

import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import reference
from covering import first
from jax import experimental
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optimizers import EXACT, INT8, each_layout, seven_bytes
from trees import assert_close, assert_same_bits, normal, random, step_of, untyped

import adam_jax
from adam_jax import RowSparseState, row_sparse

enable_x64 = (jax if hasattr(jax, "enable_x64") else experimental).enable_x64  # pyright: ignore[reportAttributeAccessIssue]

VOCABULARY, WIDTH = 200, 48  # large enough for int8
ADAM = adam_jax.adam(0.1)
VARIANTS = {
    "adam": {},
    "adamw": {"weight_decay": 0.1},
    "nadam": {},
    "nadamw": {"weight_decay": 0.1},
    "amsgrad": {},
    "adamax": {},
    "adamaxw": {"weight_decay": 0.1},
}
each_variant = pytest.mark.parametrize("name", VARIANTS)
NESTEROV = {"nadam", "nadamw"}


def takes_rows(row):
    """Returns whether `row_sparse` accepts an optimizer: it refuses one that averages the table."""
    return not row.name.startswith(("average_params", "scale_by"))


def table_of(dtype="float32", vocabulary=VOCABULARY, width=WIDTH):
    return random((vocabulary, width), dtype)


def batches(steps, size, vocabulary=VOCABULARY, width=WIDTH, seed=0):
    """Returns ids, mostly small, and gradients, both with a leading time axis.

    Gradients are multiples of 1/8, so their sums and squares are exact.
    """
    rng = np.random.default_rng(seed)
    ids = (vocabulary * rng.uniform(size=(steps, size)) ** 3).astype(np.int32)
    gradients = rng.integers(-15, 16, (steps, size, width)) / 8
    return jnp.asarray(ids), jnp.asarray(gradients, jnp.float32)


def dense(ids, gradients, table):
    """Returns the gradient of a whole table."""
    return jnp.zeros_like(table, jnp.float32).at[ids].add(gradients)


def run(rows: Any, table, batches):
    """Returns table and state after a step for each batch, in one scan."""

    @jax.jit
    def scanned(table, state, batches):
        step = lambda carry, batch: (rows.update(*batch, *carry), None)  # noqa: E731
        return jax.lax.scan(step, (table, state), batches)[0]

    return scanned(table, rows.init(table), batches)


def run_dense(optimizer, table, batches):
    """Does the same with the gradient of the whole table."""

    @jax.jit
    def scanned(table, batches):
        def step(carry, x):
            table, state = carry
            updates, state = optimizer.update(dense(x[0], x[1], table), state, table)
            return (optax.apply_updates(table, updates), state), None

        return jax.lax.scan(step, (table, optimizer.init(table)), batches)[0]

    return scanned(table, batches)


def rows_of(state, ids, table):
    """Returns some rows of a state."""
    return jax.tree.map(lambda x: x[ids] if x.shape[:1] == table.shape[:1] else x, state)


# Lazy: the definition.


def lazily(name, ids, gradients, table, learning_rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0):
    """Returns lazy steps in float64: a row moves when an id names it; all steps are counted."""
    table = np.array(table, np.float64)
    m, v = np.zeros_like(table), np.zeros_like(table)
    v_max = np.zeros_like(table)
    for t, (named, g_all) in enumerate(zip(ids, np.asarray(gradients, np.float64), strict=True), 1):
        for row in set(map(int, named)):
            g = g_all[named == row].sum(axis=0)
            m[row] = b1 * m[row] + (1 - b1) * g
            m_hat = m[row] / (1 - b1**t)
            if name in NESTEROV:
                m_hat = b1 * m[row] / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
            if name.startswith("adamax"):
                v[row] = np.maximum(b2 * v[row], np.abs(g) + eps)
                direction = m_hat / v[row]
            else:
                v[row] = b2 * v[row] + (1 - b2) * g**2
                v_max[row] = np.maximum(v_max[row], v[row])
                of_root = v_max[row] if name == "amsgrad" else v[row]
                direction = m_hat / (np.sqrt(of_root / (1 - b2**t)) + eps)
            table[row] -= learning_rate * (direction + weight_decay * table[row])
    return table


@each_variant
def test_lazy_steps_agree_with_their_definition(name):
    settings = VARIANTS[name] | {"learning_rate": 0.01}
    table, (ids, gradients) = table_of(vocabulary=40, width=3), batches(60, 5, 40, 3)
    actual, _ = run(row_sparse(getattr(adam_jax, name)(**settings)), table, (ids, gradients))
    expected = lazily(name, np.asarray(ids), gradients, table, **settings)
    assert_close(actual, expected, 5e-7)
    assert np.abs(expected - np.asarray(table)).max() > 0.02


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("setting", ["default", "short memory", "large eps"])
def test_lazy_steps_equal_torch_s_sparse_adam(setting, dtype):
    """torch adds eps to the root of nu before bias correction, so our eps changes with the step."""
    path = Path(__file__).parent / "golden" / "torch_sparse_adam.json"
    golden = json.loads(path.read_text())
    settings = dict(golden["settings"][setting]["hyperparameters"])
    expected = np.array(golden["settings"][setting]["tables"])
    eps_hat = settings.pop("eps_hat")
    with enable_x64(dtype == "float64"):
        ids, gradients = jnp.array(golden["ids"]), jnp.array(golden["gradients"], dtype)
        times = jnp.arange(1, len(ids) + 1)

        def step(carry, x):
            t, *batch = x
            eps = eps_hat / jnp.sqrt(-jnp.expm1(t.astype(dtype) * math.log(settings["b2"])))
            rows = row_sparse(adam_jax.adam(**settings, eps=eps))
            table, state = rows.update(*batch, *carry)
            return (table, state), table

        table = jnp.array(golden["initial"], dtype)
        carry = table, ADAM.init(table)
        _, actual = jax.lax.scan(step, carry, (times, ids, gradients))
        actual = np.array(actual, np.float64)
    largest = np.abs(expected).max(axis=0)
    error = np.abs(actual - expected).max(axis=0) / np.where(largest > 0, largest, 1)
    assert error.max() < {"float64": 1e-13, "float32": 30 * 2.0**-24}[dtype]
    np.testing.assert_array_equal(actual[:, 11], expected[:, 11])  # no id names this row


# Storage: the same bits as in a step of the whole table.


def assert_within_an_ulp(table, expected):
    """Asserts equality up to an ulp of the largest weight."""
    assert_close(table, expected, 2.0**-23)


@pytest.mark.covering
@each_layout
def test_a_step_of_all_rows_is_bit_identical_to_the_plain_step(row, standard_promotion):
    """So does a step of some rows, the first time, and no bit of other rows changes."""
    if not takes_rows(row):
        pytest.skip("refused")
    optimizer = row.make(**EXACT)
    rows, step = row_sparse(optimizer), step_of(optimizer)
    update = jax.jit(rows.update)
    table = expected = table_of(row.param_dtype)
    state = expected_state = rows.init(table)
    assert_same_bits(state, optimizer.init(table))
    gradients = random((3, VOCABULARY, WIDTH), "bfloat16", 1).astype(jnp.float32)
    order = np.random.default_rng(0).permutation(VOCABULARY)
    for g in gradients:
        table, state = update(order, g[order], table, state)
        expected, expected_state = step(expected, expected_state, g)
    # Nesterov's direction has no exact product, and one program fuses it with a sum.
    assert_same = assert_within_an_ulp if row.algorithm == "nadam" else assert_same_bits
    assert_same_bits(state, expected_state)
    assert_same(table, expected)
    some = order[:60]
    others = np.setdiff1d(np.arange(VOCABULARY), some)
    before, before_state = table, state
    table, state = update(some, gradients[0][some], table, state)
    expected, expected_state = step(expected, expected_state, gradients[0])
    assert_same(table[some], expected[some])
    assert_same_bits(rows_of(state, some, table), rows_of(expected_state, some, table))
    assert_same_bits(table[others], before[others])
    counts = jax.tree.map(lambda x, y: x if x.ndim == 0 else y, state, before_state)
    assert_same_bits(rows_of(state, others, table), rows_of(counts, others, table))


@pytest.mark.covering
@each_layout
def test_jit_eager_scan_and_vmap_agree(row):
    if not takes_rows(row):
        pytest.skip("refused")
    rows = row_sparse(row.make(**EXACT))
    tables = jnp.stack([table_of(row.param_dtype), 2 * table_of(row.param_dtype)])
    ids, gradients = batches(3, 16)
    scanned = [run(rows, table, (ids, gradients)) for table in tables]
    table, state = tables[0], rows.init(tables[0])
    for batch in zip(ids, gradients, strict=True):
        table, state = rows.update(*batch, table, state)
    assert_same_bits((table, state), scanned[0])
    table, state = tables, jax.vmap(rows.init)(tables)
    update = jax.jit(jax.vmap(rows.update, in_axes=(None, None, 0, 0)), donate_argnums=(2, 3))
    for batch in zip(ids, gradients, strict=True):
        table, state = update(*batch, table + 0, state)
    assert_same_bits((table, state), jax.tree.map(lambda *x: jnp.stack(x), *scanned))


@pytest.mark.slow
@pytest.mark.covering
@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("spec", [("data",), (None, "data"), ("data", "model")], ids=str)
@pytest.mark.parametrize("kind", ["float32", "five bytes", "exact"])
def test_meshes_give_the_same_bits_as_one_device(kind, spec, axes):
    optimizer = seven_bytes(**EXACT) if kind == "five bytes" else adam_jax.adamw(**EXACT)
    rows = row_sparse(optimizer, exact=kind == "exact")
    table = table_of("bfloat16" if kind == "five bytes" else "float32")
    mesh = jax.make_mesh((4, 2), ("data", "model"), (axes, axes))
    on_mesh = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))  # noqa: E731
    there = jax.device_put(table, on_mesh(*spec))
    shardings = adam_jax.state_shardings(rows, there)
    state, there_state = rows.init(table), rows.init(there)
    for x, sharding in zip(jax.tree.leaves(there_state), jax.tree.leaves(shardings), strict=True):
        assert x.ndim == 0 or x.sharding.is_equivalent_to(sharding, x.ndim)
    update, lookup = jax.jit(rows.update), jax.jit(rows.lookup)
    for i, (ids, gradients) in enumerate(zip(*batches(3, 16), strict=True)):
        table, state = update(ids, gradients, table, state)
        of_ids = [on_mesh(), on_mesh("data"), on_mesh(("data", "model"))][i]
        ids, gradients = jax.device_put((ids, gradients), of_ids)
        there, there_state = update(ids, gradients, there, there_state)
        assert there.sharding.is_equivalent_to(on_mesh(*spec), 2)
        expected = lookup(np.arange(0, VOCABULARY, 5), table, state)
        assert_same_bits(lookup(np.arange(0, VOCABULARY, 5), there, there_state), expected)
        assert lookup(ids, there, there_state).shape == gradients.shape
    caught_up = jax.jit(rows.catch_up)
    assert_same_bits(caught_up(there, there_state), caught_up(table, state))


# Ids.


@pytest.mark.parametrize("exact", [False, True])
def test_gradients_of_an_id_are_summed_in_float32(exact):
    rows = row_sparse(adam_jax.adamw(0.1), exact)
    table = table_of()
    ids = np.array([[3, 7, 3], [3, 199, 7]])
    gradients = random((2, 3, WIDTH), "bfloat16")
    wide = gradients.astype(jnp.float32).reshape(6, WIDTH)
    summed = jnp.stack([wide[0] + wide[2] + wide[3], wide[1] + wide[5], wide[4]])
    expected = rows.update(np.array([3, 7, 199]), summed, table, rows.init(table))
    assert_same_bits(rows.update(ids, gradients, table, rows.init(table)), expected)


@pytest.mark.slow
@pytest.mark.covering
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    "dtype", first(4, ["int8", "uint8", "int32", "uint32", "int16", "uint16", "int64", "uint64"])
)
def test_ids_out_of_range_are_ignored_under_jit(dtype, exact, x64):
    """In no dtype do they name another row or displace a valid id."""
    vocabulary = 20
    rows = row_sparse(adam_jax.adam(0.1), exact)
    table = table_of(vocabulary=vocabulary, width=2)
    state = rows.init(table)
    dtype = jax.dtypes.canonicalize_dtype(dtype)  # 64 bits in x64 mode only
    info = jnp.iinfo(dtype)
    valid = [3, 19, 0, 3]
    wrong = [max(info.min, -1), info.min, info.max, vocabulary, vocabulary + 3] * 6
    wrong = [x for x in wrong if not 0 <= x < vocabulary]
    ids = jnp.asarray(np.array(valid[:2] + wrong + valid[2:], dtype))
    gradients = random((ids.size, 2))
    kept = np.array([0, 1, -2, -1])
    expected = jax.jit(rows.update)(ids[kept], gradients[kept], table, state)
    actual = jax.jit(rows.update)(ids, gradients, table, state)
    assert_same_bits(actual, expected)
    vectors = jax.jit(rows.lookup)(ids, *actual)
    np.testing.assert_array_equal(vectors[kept], np.asarray(actual[0])[valid])
    np.testing.assert_array_equal(vectors[2:-2], 0)
    with pytest.raises(ValueError, match=r"ids\[2\] is .* but the table has 20 rows"):
        rows.update(ids, gradients, table, state)
    with pytest.raises(ValueError, match=r"ids\[2\] is "):
        rows.lookup(ids, table, state)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    "shape", first(3, [((),), ((2, 3),), ((0,),), ((1,),), ((2, 0),), ((300,),)]), ids=str
)
def test_ids_may_have_any_shape(shape, exact):
    rows = row_sparse(adam_jax.adamw(0.1), exact)
    table = random((VOCABULARY, 3, 2))  # rows may have any shape too
    ids = np.full(shape, 7)
    state = rows.init(table)
    vectors = rows.lookup(ids, table, state)
    assert vectors.shape == (*shape, 3, 2)
    new, new_state = jax.jit(rows.update)(ids, jnp.ones_like(vectors), table, state)
    counted: Any = new_state.inner_state if exact else new_state
    [moments, *_] = counted
    assert int(moments.count) == 1
    changed = np.unique(np.argwhere(np.asarray(new != table))[:, 0])
    assert changed.tolist() == ([7] if ids.size else [])
    one = rows.update(np.array([7]), jnp.full((1, 3, 2), float(ids.size)), table, state)
    if ids.size:
        assert_same_bits((new, new_state), one)


def test_a_step_allocates_nothing_as_large_as_the_table():
    """Lookup, gradients and update with donated arguments neither copy nor fill a table."""
    rows = row_sparse(ADAM, exact=True)
    table = jax.ShapeDtypeStruct((100_000, 64), jnp.float32)
    state = jax.eval_shape(rows.init, table)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(table, state, ids):
        loss_of = lambda vectors: jnp.sum(jnp.tanh(vectors) ** 2)  # noqa: E731
        gradients = jax.grad(loss_of)(rows.lookup(ids, table, state))
        return rows.update(ids, gradients, table, state)

    compiled = step.lower(table, state, jax.ShapeDtypeStruct((32,), jnp.int32)).compile()
    memory = untyped(compiled.memory_analysis())
    kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((table, state)))
    assert memory.alias_size_in_bytes >= kept - 8
    assert memory.temp_size_in_bytes < 1e6  # the table has 25.6e6


def test_steps_of_rows_and_of_the_table_may_alternate():
    """Lazy steps use the optimizer's own state."""
    optimizer = adam_jax.adamw(0.1)
    rows, step = row_sparse(optimizer), step_of(optimizer)
    table = table_of()
    state = optimizer.init(table)
    for i, (ids, gradients) in enumerate(zip(*batches(4, 9), strict=True)):
        if i % 2:
            table, state = step(table, state, dense(ids, gradients, table))
        else:
            table, state = rows.update(ids, gradients, table, state)
    assert int(untyped(state)[0].count) == 4
    assert rows.catch_up(table, state)[0] is table


# Exact: Adam on the gradient of the whole table.

SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 50, 1000, 1e-4)
RATES = {"constant": 1e-2, "scheduled": SCHEDULE}
STEPS = 1000


@functools.cache
def zipf():
    """Returns ids by Zipf's law, gradients of many sizes; some rows idle for hundreds of steps."""
    rng = np.random.default_rng(0)
    vocabulary, size, width = 300, 16, 8
    chances = 1 / np.arange(1, vocabulary - 19) ** 1.1
    ids = rng.choice(vocabulary - 20, size=(STEPS, size), p=chances / chances.sum())
    for k, idle in enumerate([1, 2, 5, 16, 17, 33, 100, 180, 500, 900]):
        row = vocabulary - 1 - k
        ids[[k, k + idle, min(k + 2 * idle, STEPS - 1 - k)], 0] = row
    sizes = np.exp(rng.standard_normal((STEPS, size, 1)) - 4)
    gradients = (rng.standard_normal((STEPS, size, width)) * sizes).astype(np.float32)
    table = rng.standard_normal((vocabulary, width)).astype(np.float32)
    return table, ids.astype(np.int32), gradients


def in_float64(name, rate, settings):
    """Returns table and nu after a run on gradients of the whole table, in float64."""
    table, ids, gradients = zipf()
    whole = np.zeros((STEPS, *table.shape))
    for t in range(STEPS):
        np.add.at(whole[t], ids[t], gradients[t].astype(np.float64))
    rates = np.array([rate(t) if callable(rate) else rate for t in range(STEPS)], np.float64)
    theta = np.array(table, np.float64)
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    v_max = np.zeros_like(theta)
    b1, b2 = settings.get("b1", 0.9), settings.get("b2", 0.999)
    eps, decay = 1e-8, settings.get("weight_decay", 0)
    for t, (g, alpha) in enumerate(zip(whole, rates, strict=True), start=1):
        m = b1 * m + (1 - b1) * g
        m_hat = m / (1 - b1**t)
        if name in NESTEROV:
            m_hat = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
        if name.startswith("adamax"):
            v = np.maximum(b2 * v, np.abs(g) + eps)
            direction = m_hat / v
        else:
            v = b2 * v + (1 - b2) * g**2
            v_max = np.maximum(v_max, v)
            of_root = v_max if name == "amsgrad" else v
            direction = m_hat / (np.sqrt(of_root / (1 - b2**t)) + eps)
        theta -= alpha * (direction + decay * theta)
    return theta, v


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rate", "betas"),
    first(
        4,
        [
            ("adamw", "scheduled", (0.99, 0.999)),
            ("nadamw", "constant", (0.0, 0.95)),
            ("amsgrad", "scheduled", (0.9, 0.999)),
            ("adamaxw", "constant", (0.9, 0.999)),
            *((name, "scheduled", (0.9, 0.999)) for name in VARIANTS if name != "amsgrad"),
            ("adam", "constant", (0.9, 0.999)),
            ("adamw", "constant", (0.0, 0.95)),
            ("nadamw", "scheduled", (0.0, 0.999)),
            ("adamw", "constant", (0.9, 0.95)),
            ("adam", "scheduled", (0.95, 0.95)),
            ("nadamw", "constant", (0.95, 0.999)),
        ],
    ),
)
def test_exact_steps_agree_with_adam_on_the_whole_table(name, rate, betas, standard_promotion):
    settings = VARIANTS[name] | dict(zip(("b1", "b2"), betas, strict=True))
    optimizer = getattr(adam_jax, name)(RATES[rate], **settings)
    rows = row_sparse(optimizer, exact=True)
    table, *batches = map(jnp.asarray, zipf())
    actual, state = run(rows, table, batches)
    assert int(jnp.max(1000 - state.last_step)) == 1000  # no id ever names this row
    found = jax.jit(rows.lookup)(jnp.arange(len(table)), actual, state)
    actual, state = jax.jit(rows.catch_up)(actual, state)
    assert_same_bits(found, actual)
    plain, plain_state = run_dense(optimizer, table, batches)
    expected, expected_nu = in_float64(name, RATES[rate], settings)
    assert np.abs(expected - np.asarray(table)).max() > 0.02

    def error(table):
        return np.abs(np.asarray(table, np.float64) - expected).max() / np.abs(expected).max()

    assert error(actual) <= max(1e-6, 1.5 * error(plain))
    nu = np.asarray(state.inner_state[0].nu, np.float64)
    normal = expected_nu > 1e-37  # the CPU flushes smaller numbers to 0
    assert np.all(np.abs(nu - expected_nu)[normal] <= 4e-6 * expected_nu[normal])
    assert_close(state.inner_state[0].mu, plain_state[0].mu, 1e-6)
    assert_same_bits(state.inner_state[0].count, plain_state[0].count)


def test_exact_steps_agree_in_float64_too(standard_promotion):
    with enable_x64(True):
        table, ids, gradients = zipf()
        table, few = jnp.asarray(table, float), (ids[:200], jnp.asarray(gradients[:200], float))
        optimizer = adam_jax.adamw(SCHEDULE)
        rows = row_sparse(optimizer, exact=True)
        actual, state = rows.catch_up(*run(rows, table, few))

        @jax.jit
        def scanned(table, batches):
            def step(carry, x):
                table, state = carry
                g = jnp.zeros_like(table).at[x[0]].add(x[1])
                updates, state = optimizer.update(g, state, table)
                return (optax.apply_updates(table, updates), state), None

            return jax.lax.scan(step, (table, optimizer.init(table)), batches)[0]

        expected, expected_state = scanned(table, few)
        assert_close(actual, expected, 1e-9)  # the rest of a step after K others, times the rate
        assert_close(state.inner_state[0].nu, expected_state[0].nu, 1e-13)


@pytest.mark.parametrize("kind", first(2, ["int8", "master weights", "bfloat16", "int8 for mu"]))
def test_rounded_values_stay_unbiased_over_idle_steps(kind, standard_promotion):
    """The mean over rows with the same gradients is as close to float32 as with dense steps.

    In int8, dense steps have a bias over few steps. Random bits turn from one step to the next,
    so errors cancel over more steps.
    """
    formats = {"int8": INT8, "int8 for mu": {"mu_dtype": "int8"}, "master weights": {}}
    moments = formats.get(kind, {"mu_dtype": kind, "nu_dtype": kind})
    settings: dict[str, Any] = {"learning_rate": 1e-3, "weight_decay": 0.1}
    low = kind == "master weights"
    exact = adam_jax.adamw(**settings)
    optimizer = adam_jax.adamw(**settings, **moments)
    if low:
        optimizer = adam_jax.master_weights(optimizer, "none")
    vocabulary, width = 2000, 32
    every = jnp.arange(vocabulary)
    one_row = random((1, width), "bfloat16")
    gradients = jnp.asarray(normal(3, 1, width, seed=1))
    gradients = jnp.stack([gradients, *[jnp.zeros_like(gradients)] * 5], 1).reshape(18, 1, width)
    # Under jit, ids out of range make a step of other rows.
    ids = jnp.where(jnp.arange(18)[:, None] % 6 == 0, every, -1)

    @jax.jit
    def sparsely(table, ids, gradients):
        rows = row_sparse(optimizer, exact=True)

        def step(carry, x):
            ids, g = x
            return rows.update(ids, jnp.broadcast_to(g, table.shape), *carry), None

        carry = table, rows.init(table)
        return _unwrapped(rows.catch_up(*jax.lax.scan(step, carry, (ids, gradients))[0]))

    @functools.partial(jax.jit, static_argnums=0)
    def densely(optimizer, table, gradients):
        def step(carry, g):
            table, state = carry
            g = jnp.broadcast_to(g, table.shape).astype(jnp.float32)
            updates, state = optimizer.update(g, state, table)
            return (optax.apply_updates(table, updates), state), None

        return jax.lax.scan(step, (table, optimizer.init(table)), gradients)[0]

    def means(table, state):
        [found] = adam_jax.convert_state(state.inner_state if low else state, None, None)[:1]
        # Steps are not linear in the moments: unbiased moments do not make the table unbiased.
        numbers = [table] if low else [found.mu, found.nu]
        of_rows = [np.asarray(x, np.float64) for x in numbers]
        return [(x.mean(axis=0), x.std(axis=0) / math.sqrt(len(x))) for x in of_rows]

    table = jnp.broadcast_to(one_row, (vocabulary, width)).astype("bfloat16" if low else "float32")
    expected_table, expected = densely(exact, one_row.astype(jnp.float32), gradients)
    of_sparse = means(*sparsely(table, ids, gradients))
    of_dense = means(*densely(optimizer, table, gradients))
    desired = [expected_table] if low else [expected[0].mu, expected[0].nu]
    rms = lambda x: np.sqrt(np.mean(np.square(x)))  # noqa: E731
    for i, (mean, spread) in enumerate(of_sparse):
        exactly, (dense_mean, _) = np.asarray(desired[i][0], np.float64), of_dense[i]
        bias, dense_bias = rms((mean - exactly) / exactly), rms((dense_mean - exactly) / exactly)
        assert bias <= 1.2 * dense_bias + 2 * rms(spread / exactly) + 4e-6


def test_exact_steps_work_in_five_bytes(standard_promotion):
    """With 5 bytes per parameter, dense and exact runs differ by no more than their rounding."""
    optimizer = seven_bytes(1e-2)
    rows = row_sparse(optimizer, exact=True)
    table, *batches = zipf()
    table = jnp.tile(jnp.asarray(table), (1, 4)).astype(jnp.bfloat16)
    few = jnp.asarray(batches[0][:300]), jnp.tile(jnp.asarray(batches[1][:300]), (1, 1, 4))
    actual = adam_jax.master_params(*_unwrapped(rows.catch_up(*run(rows, table, few))))
    expected = adam_jax.master_params(*run_dense(optimizer, table, few))
    wide, _ = run_dense(adam_jax.adamw(1e-2), table.astype(jnp.float32), few)
    error = lambda x: float(jnp.sqrt(jnp.mean((x - wide) ** 2)))  # noqa: E731
    assert error(actual) < 1.2 * error(expected)


def _unwrapped(table_and_state):
    table, state = table_and_state
    return table, state.inner_state


def test_catching_up_twice_changes_nothing():
    for optimizer in (adam_jax.adamw(**EXACT), seven_bytes(**EXACT)):
        rows = row_sparse(optimizer, exact=True)
        low = isinstance(
            optimizer.init(jnp.ones((8, 8), jnp.bfloat16)), adam_jax.MasterWeightsState
        )
        table, state = run(rows, table_of("bfloat16" if low else "float32"), batches(5, 7))
        once = rows.catch_up(table, state)
        assert_same_bits(rows.catch_up(*once), once)
        assert np.all(np.asarray(once[1].last_step) == 5)


def test_a_checkpoint_continues(tmp_path):
    rows = row_sparse(seven_bytes(1e-2), exact=True)
    table = table_of("bfloat16")
    ids, gradients = batches(6, 12)
    update = jax.jit(rows.update)
    state = rows.init(table)
    for i in range(3):
        table, state = update(ids[i], gradients[i], table, state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", (table, state))
        checkpointer.wait_until_finished()
        like = jax.tree.map(jnp.zeros_like, (table, state))
        restored = checkpointer.restore(tmp_path / "run", like)
    assert_same_bits(restored, (table, state))
    for i in range(3, 6):
        table, state = update(ids[i], gradients[i], table, state)
        restored = update(ids[i], gradients[i], *restored)
    assert_same_bits(restored, (table, state))


# Other optimizers and wrappers.


def test_hyperparameters_may_be_traced_or_injected(standard_promotion):
    table, few = table_of(), batches(4, 9)
    expected = run(row_sparse(adam_jax.adamw(0.1, b1=0.8)), table, few)

    @jax.jit
    def traced(rate, b1):
        return run(row_sparse(adam_jax.adamw(rate, b1=b1)), table, few)

    assert_close(traced(jnp.float32(0.1), jnp.float32(0.8)), expected, 1e-6)
    injected = optax.inject_hyperparams(adam_jax.adamw)(learning_rate=0.1, b1=0.8)
    assert_close(run(row_sparse(injected), table, few)[0], expected[0], 1e-6)
    assert_close(run(row_sparse(optax.adamw(0.1, b1=0.8)), table, few)[0], expected[0], 1e-6)


def test_a_chain_clips_the_gradients_of_the_rows(standard_promotion):
    clipped = optax.chain(optax.clip_by_global_norm(1.0), adam_jax.adam(0.1))
    table, (ids, gradients) = table_of(), batches(1, 9)
    rows = row_sparse(clipped)
    actual, _ = rows.update(ids[0], gradients[0], table, rows.init(table))
    expected, _ = step_of(clipped)(table, clipped.init(table), dense(ids[0], gradients[0], table))
    assert_close(actual, expected, 1e-6)


def test_apply_if_finite_rejects_gradients_that_are_not_finite(standard_promotion):
    rows = row_sparse(optax.apply_if_finite(adam_jax.adam(0.1), 5))
    table = table_of()
    state = rows.init(table)
    gradients = jnp.full((2, WIDTH), jnp.nan)
    new, new_state = rows.update(np.array([1, 2]), gradients, table, state)
    assert_same_bits(new, table)
    assert_same_bits(new_state.inner_state, state.inner_state)


@pytest.mark.parametrize(
    ("optimizer", "name"),
    [
        (optax.MultiSteps(adam_jax.adam(1e-3), 2), "MultiStepsState"),
        (adam_jax.average_params(adam_jax.adam(1e-3), 0.9), "AverageParamsState"),
        (optax.chain(adam_jax.adam(1e-3), optax.trace(0.9)), "TraceState"),
        (adam_jax.check_landing(adam_jax.master_weights(adam_jax.adam(1), "int8")), "CheckLanding"),
        (optax.contrib.schedule_free(adam_jax.adam(1e-3, b1=0.0), 1e-3), "ScheduleFreeState"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_optimizers_that_store_more_of_a_row_are_refused(optimizer, name, standard_promotion):
    with pytest.raises(ValueError, match=f"no rule for {name}"):
        row_sparse(optimizer).init(table_of("bfloat16"))


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        (adam_jax.adam(1e-3, b1=0.95, b2=0.9), r"b1 = 0.95 .* never come to rest"),
        (adam_jax.adamax(1e-3, b1=0.9, b2=0.9), "never come to rest"),
        (adam_jax.adam(1e-3, eps_root=1e-8), "eps_root"),
        (adam_jax.adamw(2.0, weight_decay=0.5), "less than 1, got 1.0"),
        (optax.inject_hyperparams(adam_jax.adam)(learning_rate=1e-3), "adam_jax's own"),
        (optax.adam(1e-3), "adam_jax's own"),
        (optax.chain(optax.clip(1.0), adam_jax.adam(1e-3)), "adam_jax's own"),
        (optax.chain(adam_jax.scale_by_adam(), optax.scale(-1e-3)), "adam_jax's own"),
        (optax.chain(adam_jax.scale_by_adam(), adam_jax.adam(1e-3)), "adam_jax's own"),
    ],
)
def test_steps_that_cannot_be_replayed_are_refused(optimizer, reason, standard_promotion):
    with pytest.raises(ValueError, match=reason):
        row_sparse(optimizer, exact=True).init(table_of())


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "b1", "b2", "eps"])
def test_traced_hyperparameters_cannot_be_replayed(name):
    settings: dict[str, Any] = {"learning_rate": 1e-3}

    def init(x):
        optimizer = adam_jax.adamw(**settings | {name: x})
        return row_sparse(optimizer, exact=True).init(table_of())

    with pytest.raises(ValueError, match=f"{name} is traced"):
        jax.jit(init)(0.5)


def test_constant_arrays_can_be_replayed():
    table = table_of()
    settings: dict[str, Any] = {"learning_rate": 0.1, "b1": 0.5, "weight_decay": 0.25}
    arrays: dict[str, Any] = {name: jnp.float32(x) for name, x in settings.items()}
    few = batches(6, 3)
    numbers, constants = (
        run(row_sparse(adam_jax.adamw(**x), exact=True), table, few) for x in (settings, arrays)
    )
    assert_close(constants, numbers, 1e-6)


def test_a_mask_decides_whether_a_table_decays():
    few = batches(6, 3)
    for mask in (False, lambda table: False):
        masked = adam_jax.adamw(0.1, weight_decay=0.5, mask=mask)
        rows, plain = (row_sparse(x, exact=True) for x in (masked, ADAM))
        actual, expected = (x.catch_up(*run(x, table_of(), few))[0] for x in (rows, plain))
        assert_close(actual, expected, 1e-6)


def test_an_exact_lookup_has_no_derivative():
    table = table_of()
    lazy, exact = row_sparse(ADAM), row_sparse(ADAM, exact=True)
    ids = np.array([1, 2])
    loss_of = lambda rows, table: jnp.sum(rows.lookup(ids, table, rows.init(table)))  # noqa: E731
    with pytest.raises(TypeError, match="no derivative"):
        jax.grad(functools.partial(loss_of, exact))(table)
    gradient = jax.grad(functools.partial(loss_of, lazy))(table)
    assert float(gradient.sum()) == 2 * WIDTH


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "one array", lambda rows: rows.init({"a": table_of()})),
        (TypeError, "one array", lambda rows: rows.init(None)),
        (TypeError, "dtype int32", lambda rows: rows.init(jnp.ones((3, 3), jnp.int32))),
        (ValueError, r"table\[:, None\]", lambda rows: rows.init(jnp.ones(3))),
        (
            TypeError,
            "ids must be integers, got dtype float32",
            lambda rows: rows.lookup(jnp.ones(3), table_of(), ADAM.init(table_of())),
        ),
        (
            ValueError,
            r"shape \(2, 47\)",
            lambda rows: rows.update(
                np.array([1, 2]), jnp.ones((2, 47)), table_of(), ADAM.init(table_of())
            ),
        ),
        (
            TypeError,
            "expected",
            lambda rows: rows.update(np.array([1]), jnp.ones((1, WIDTH)), table_of(), ({},)),
        ),
    ],
)
def test_mistakes_are_named(error, message, call):
    with pytest.raises(error, match=message):
        call(row_sparse(ADAM))


def test_exact_steps_refuse_the_state_of_lazy_steps():
    rows = row_sparse(ADAM, exact=True)
    for call in (
        lambda state: rows.lookup(np.array([1]), table_of(), state),
        lambda state: rows.update(np.array([1]), jnp.ones((1, WIDTH)), table_of(), state),
        lambda state: rows.catch_up(table_of(), state),
    ):
        with pytest.raises(TypeError, match="RowSparseState"):
            call(ADAM.init(table_of()))
    assert isinstance(rows.init(table_of()), RowSparseState)


@pytest.mark.parametrize("exact", [False, True])
def test_the_state_of_another_table_is_refused(exact):
    rows = row_sparse(ADAM, exact)
    state = rows.init(table_of(vocabulary=VOCABULARY + 1))
    message = rf"mu has shape \(201, {WIDTH}\), but the table has 200 rows"
    with pytest.raises(ValueError, match=message):
        rows.update(np.array([1]), jnp.ones((1, WIDTH)), table_of(), state)
    if exact:
        with pytest.raises(ValueError, match=message):
            rows.lookup(np.array([1]), table_of(), state)
        with pytest.raises(ValueError, match=message):
            rows.catch_up(table_of(), state)


def test_complex_tables_agree_with_the_reference():
    table = random((20, 3), "complex64")
    ids, gradients = np.array([1, 5, 1]), random((3, 3), "complex64")
    rows = row_sparse(ADAM)
    actual, _ = rows.update(ids, gradients, table, rows.init(table))
    whole = jnp.zeros_like(table).at[ids].add(gradients)
    expected = reference.trajectory(np.asarray(whole)[None], learning_rate=0.1)[0]
    assert_close(actual - table, expected, 1e-5)
    exact = row_sparse(ADAM, exact=True)
    table, state = exact.update(ids, gradients, table, exact.init(table))
    for _ in range(3):
        table, state = exact.update(ids[:0], gradients[:0], table, state)
    table, _ = exact.catch_up(table, state)
    zeros = [np.zeros_like(whole)] * 3
    steps = reference.trajectory(np.stack([np.asarray(whole), *zeros]), learning_rate=0.1)
    assert_close(table - random((20, 3), "complex64"), steps.sum(axis=0), 1e-5)

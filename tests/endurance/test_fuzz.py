"""The fuzzer finds no fault in two thousand updates, and finds every fault made on purpose."""

import collections
import dataclasses
import itertools

import fuzz
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from covering import first
from fuzz import REGRESSIONS, Case, Leaf
from optimizers import ROWS

import adam_jax

# Some random trees have no leaf in 16 bits. master_weights then warns and changes nothing.
pytestmark = pytest.mark.filterwarnings("ignore::adam_jax.NoLowPrecisionWarning")

PARTS = 4  # each with a fourth of the cases, to run in parallel


@pytest.mark.slow
@pytest.mark.parametrize("i", range(len(REGRESSIONS)))
def test_past_failures_stay_fixed(i):
    fuzz.run_case(REGRESSIONS[i], collections.Counter())


@pytest.mark.slow
@pytest.mark.parametrize("part", first(1, range(PARTS)))
def test_random_cases_pass_all_checks(part):
    tally = collections.Counter()
    for number in itertools.count(part, PARTS):
        case = fuzz.draw_case(0, number, steps=10)
        try:
            fuzz.run_case(case, tally)
        except Exception as error:
            error.add_note(
                f"uv run tests/endurance/fuzz.py --seed 0 --steps 10 --case {number}\n{case}"
            )
            raise
        if tally["all", "updates"] >= 500:
            break
    assert tally["all", "cases"] >= 10


EACH = [(row.name, "none") for row in ROWS]
EACH += [("adamw", wrapper) for wrapper in ("average_params", "none remainder", "int8 remainder")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "wrapper"), EACH)
def test_all_wrong_inputs_are_refused(name, wrapper):
    row = fuzz.ROW[name]
    tree = {"a": [Leaf((5, 3)), None], "b": Leaf((), "bfloat16", "bfloat16")}
    case = Case(name, tree, (row.mu_format, row.nu_format), wrapper, mode="eager", steps=1)
    tally = collections.Counter()
    fuzz.run_case(case, tally, wrong=100)
    assert len([table for table, _ in tally if table.startswith("wrong")]) >= 10


# ---------------------------------------------------------------- faults on purpose

PLAIN = Case("adam", {"a": Leaf((5, 3)), "b": Leaf((7,)), "frozen": Leaf((2,), gradient=None)})
INT8 = Case("adam", Leaf((64, 64)), ("int8", "int8"))
NU_IN_INT8 = Case("adam", Leaf((64, 64)), (None, "int8"))


def at_step_five(change):
    """Breaks a step in the middle of a chunk, where the chunk's last outputs do not show it."""

    def update(inner, g, state, params):
        u, new = inner(g, state, params)
        bad = change(u, new, state)
        five = new[0].count == 5
        return jax.tree.map(lambda x, y: jnp.where(five, x, y), bad, (u, new))

    return update


def with_moments(state, **changes):
    return (state[0]._replace(**changes), *state[1:])


def nan_in_an_update(u, new, old):
    return u | {"b": u["b"].at[3].set(jnp.nan)}, new


def infinity_in_mu(u, new, old):
    mu = new[0].mu
    return u, with_moments(new, mu=mu | {"b": mu["b"].at[3].set(jnp.inf)})


def negative_nu(u, new, old):
    nu = new[0].nu
    return u, with_moments(new, nu=nu | {"b": nu["b"].at[3].add(-3e38)})


def a_count_that_stands_still(u, new, old):
    return u, with_moments(new, count=old[0].count)


def a_frozen_leaf_moves(u, new, old):
    return u, with_moments(new, mu=new[0].mu | {"frozen": jnp.ones(2)})


def no_code_of_mu(u, new, old):
    return u, with_moments(new, mu=new[0].mu.at[3, 3].set(127))  # 63, and up to 62 are used


def no_code_of_nu(u, new, old):
    codes = new[0].nu.codes.at[3, 3].set(255)
    return u, with_moments(new, nu=new[0].nu._replace(codes=codes))


def nu_max_shrinks(u, new, old):
    return u, with_moments(new, nu_max=jax.tree.map(jnp.zeros_like, new[0].nu_max))


def longer_steps(inner, g, state, params):
    u, new = inner(g, state, params)
    return jax.tree.map(lambda u: 1.0001 * u, u), new


def another_dtype_of_mu(inner, g, state, params):
    # The next step would refuse this.
    mu = jax.tree.map(lambda m: m.astype(jnp.float32), state[0].mu)
    u, new = inner(g, with_moments(state, mu=mu), params)
    return u, with_moments(new, mu=jax.tree.map(lambda m: m.astype(jnp.float16), new[0].mu))


def another_dtype_of_updates(inner, g, state, params):
    u, new = inner(g, state, params)
    return jax.tree.map(lambda u: u.astype(jnp.bfloat16), u), new


def hidden_nan(inner, g, state, params):
    return inner(jax.tree.map(jnp.nan_to_num, g), state, params)


def spread(g, finite):
    return jax.tree.map(lambda g: g + jnp.where(finite, 0, jnp.nan), g)


def nan_that_spreads(inner, g, state, params):
    g = jax.tree.map(lambda g: spread(g, jnp.isfinite(g).all()), g)
    return inner(g, state, params)


def nan_that_spreads_to_other_leaves(inner, g, state, params):
    finite = jnp.isfinite(g["a"]).all() & jnp.isfinite(g["b"]).all()
    return inner(spread(g, finite), state, params)


def integers_are_cast(inner, g, state, params):
    return inner(jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), g), state, params)


def another_exception(inner, g, state, params):
    try:
        return inner(g, state, params)
    except (ValueError, TypeError) as error:
        raise KeyError(str(error)) from error


def without_a_path(inner, g, state, params):
    try:
        return inner(g, state, params)
    except (ValueError, TypeError) as error:
        raise type(error)("expected something else") from error


BROKEN = [
    (PLAIN, at_step_five(nan_in_an_update), "update of leaf 1"),
    (PLAIN, at_step_five(infinity_in_mu), r"mu\['b'\] is not finite"),
    (PLAIN, at_step_five(negative_nu), "nu is negative"),
    (PLAIN, longer_steps, "update of leaf"),
    (PLAIN, at_step_five(a_count_that_stands_still), "count"),
    (PLAIN, at_step_five(a_frozen_leaf_moves), "a None gradient"),
    (INT8, at_step_five(no_code_of_mu), "a code that mu does not have"),
    (NU_IN_INT8, at_step_five(no_code_of_nu), "nu beyond its scale"),
    (
        dataclasses.replace(PLAIN, row="amsgrad", seed=1),
        at_step_five(nu_max_shrinks),
        "nu_max shrank",
    ),
    (dataclasses.replace(PLAIN, mode="jit"), another_dtype_of_mu, "the state changed its"),
    (PLAIN, another_dtype_of_updates, "updates of another structure or dtype"),
    (PLAIN, hidden_nan, "is hidden"),
    (PLAIN, nan_that_spreads, "more has changed"),
    (PLAIN, nan_that_spreads_to_other_leaves, "more has changed"),
    (PLAIN, integers_are_cast, "wrong input"),
    (PLAIN, another_exception, "wrong input"),
    (PLAIN, without_a_path, "wrong input"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "update", "message"), BROKEN)
def test_broken_steps_are_found(case, update, message):
    def make(case):
        optimizer = fuzz.make(case)
        return optax.GradientTransformationExtraArgs(
            optimizer.init,
            lambda updates, state, params=None: update(optimizer.update, updates, state, params),
        )

    with pytest.raises(AssertionError, match=message):
        fuzz.run_case(case, collections.Counter(), make=make, wrong=100)


@pytest.mark.slow
def test_apply_if_finite_that_lets_a_nan_through_is_found():
    case = dataclasses.replace(PLAIN, wrapper="apply_if_finite", tree={"a": Leaf((5, 3))})
    fuzz.run_case(case, collections.Counter())
    with pytest.raises(AssertionError):
        fuzz.run_case(
            case,
            collections.Counter(),
            make=lambda case: optax.apply_if_finite(adam_jax.adam(0.1), 0),
        )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_values_belong_to_their_classes(dtype):
    rng, info = np.random.default_rng(0), jnp.finfo(dtype)
    shape = (50, 20)
    for name in fuzz.CLASSES:
        x = fuzz.values(rng, name, shape, dtype)
        assert x.dtype == jnp.dtype(dtype)
        assert x.shape == shape
        assert np.isfinite(x).all()
    size = {
        name: np.abs(fuzz.values(rng, name, shape, dtype).astype(np.float64))
        for name in fuzz.CLASSES
    }
    assert not size["zero"].any()
    assert (size["subnormal"] > 0).any()
    assert (size["subnormal"] <= float(info.tiny)).all()
    assert (size["smallest normal"] == float(info.tiny)).all()
    assert (size["largest"] == float(info.max)).all()
    for name in ("mixed", "any bits"):
        assert size[name].max() > 0.1 * float(info.max)
        assert size[name].min() <= float(info.tiny)
    names = collections.Counter()
    for _ in range(50):
        spoilt, where = fuzz.spoil(rng, fuzz.values(rng, "moderate", (7,), dtype), names)
        with np.errstate(invalid="ignore"):  # which a signalling NaN raises
            np.testing.assert_array_equal(np.isfinite(spoilt), ~where)
        assert where.any()
    kinds = {name for _, name in names}
    assert kinds == {"infinity", "NaN", "signalling NaN", "NaN with a payload"}


def test_a_case_can_be_repeated():
    for number in range(20):
        assert fuzz.draw_case(3, number, 10) == fuzz.draw_case(3, number, 10)
    case = fuzz.draw_case(3, 0, 10)
    # The printed case can be put into REGRESSIONS.
    assert eval(repr(case), fuzz.__dict__) == case

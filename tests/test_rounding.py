"""Random bits, unbiased rounding, and float32 numbers split into 16 bits and a remainder."""

import functools
import itertools
import os
import subprocess
import sys

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from adam_jax._rounding import draw, draws, key_of_leaf, random_bits, split

SHAPE = (512, 512)
ELEMENTS = 512 * 512


@functools.partial(jax.jit, static_argnums=1)
def phases(leaf=0, shape=SHAPE):
    return random_bits(shape, key_of_leaf(jnp.uint32(leaf)))


@functools.partial(jax.jit, static_argnums=2, static_argnames="way")
def words_of(leaf, step, shape=SHAPE, *, way="independent"):
    """Returns the words that a leaf draws at a step."""
    return getattr(draw(key_of_leaf(jnp.uint32(leaf)), step), way)(jnp.zeros(shape))


def chi_square(counts):
    expected = counts.sum() / counts.size
    return np.sum((counts - expected) ** 2) / expected


def assert_uniform(values, categories):
    """Asserts that chi-square, of mean k - 1 and variance 2 (k - 1), is within 5 deviations."""
    counts = np.bincount(np.ravel(values), minlength=categories)
    degrees = categories - 1
    assert abs(chi_square(counts) - degrees) < 5 * np.sqrt(2 * degrees)


@pytest.mark.parametrize(("leaf", "step"), [(0, 0), (1, 0), (0, 1), (999, 123456), (2**31, 2**31)])
def test_bytes_are_uniform(leaf, step):
    words = np.asarray(words_of(np.uint32(leaf), np.uint32(step)))
    for shift in (0, 8, 16, 24):
        assert_uniform((words >> shift) & 0xFF, 256)


@pytest.mark.parametrize("axis", [0, 1])
def test_neighbours_are_independent(axis):
    """Pairs of four-bit digits of neighbouring elements fill all 256 cells alike."""
    words = np.asarray(phases(3))
    a, b = np.delete(words, -1, axis), np.delete(words, 0, axis)
    for one, other in itertools.product((0, 12, 28), repeat=2):
        assert_uniform(16 * ((a >> one) & 15) + ((b >> other) & 15), 256)


@pytest.mark.parametrize(("one", "other"), [(0, 1), (7, 8), (2, 147), (2**31, 2**32 - 1)])
def test_leaves_are_independent(one, other):
    a, b = np.asarray(phases(np.uint32(one))), np.asarray(phases(np.uint32(other)))
    for shift in (0, 14, 28):
        assert_uniform(16 * ((a >> shift) & 15) + ((b >> shift) & 15), 256)
    # Nor is one a shifted copy of the other: neighbouring leaves would round alike.
    assert np.intersect1d(a[:4].ravel(), b[:4].ravel()).size <= 5


def test_every_bit_is_uncorrelated_with_every_other():
    words = np.asarray(phases(11))
    signs = np.stack([2.0 * ((words.ravel() >> k) & 1) - 1 for k in range(32)])
    correlation = signs @ signs.T / ELEMENTS
    np.testing.assert_allclose(correlation, np.eye(32), atol=5 / np.sqrt(ELEMENTS))
    shifted = signs[:, 1:] @ signs[:, :-1].T / (ELEMENTS - 1)
    np.testing.assert_allclose(shifted, 0, atol=5 / np.sqrt(ELEMENTS))


HALVES = {"upper half": (16, 2**16), "lower half": (0, 2**16), "lower 14 bits": (0, 2**14)}
each_half = pytest.mark.parametrize("half", HALVES)


def fractions(words, half):
    """Returns half of each word as a fraction of its range, in [0, 1)."""
    shift, size = HALVES[half]
    return (np.asarray(words) >> shift) % size / size


@functools.cache
def redrawn_over_steps(draws, elements):
    each_step = jax.vmap(lambda step: words_of(4, step, (elements,)))
    return np.asarray(each_step(np.arange(draws, dtype=np.int32)))


@each_half
def test_draws_are_uncorrelated_over_elements(half):
    """Draws are odd multiples of the phases, so the ratios of few pairs are simple fractions."""
    x = fractions(redrawn_over_steps(50, 4096), half)
    off = np.asarray(np.corrcoef(x))[np.triu_indices(50, 1)]
    # Independent draws would have 1 / sqrt(4096) = 1 / 64, and the largest of 1225 would be below
    # 5 of these. A pair with a ratio of 3 or 5 comes up to 1/3.
    assert np.sqrt(np.mean(off**2)) < 1.15 / 64
    assert np.max(np.abs(off)) < 0.34
    assert abs(np.mean(off)) < 1e-3


@each_half
def test_draws_of_an_element_are_independent_over_steps(half):
    """Pairs are uniform over all elements together, and uncorrelated for each element."""
    x = fractions(redrawn_over_steps(2000, 256), half)
    for lag in (1, 2, 3, 10):
        # Pairs of draws; no draw is in two pairs.
        pairs = x[: len(x) // (2 * lag) * 2 * lag].reshape(-1, 2, lag, 256)
        one, other = np.floor(16 * pairs[:, 0]), np.floor(16 * pairs[:, 1])
        assert_uniform((16 * one + other).astype(int), 256)
        # In units of the standard deviation for 2000 independent draws.
        correlation = 12 * np.mean((x[lag:] - 0.5) * (x[:-lag] - 0.5), axis=0) * np.sqrt(2000)
        assert abs(np.sqrt(np.mean(correlation**2)) - 1) < 5 / np.sqrt(2 * 256)
        assert abs(np.mean(correlation)) < 5 / np.sqrt(256)


def test_no_element_repeats_another():
    """Each of 2^32 elements has its own word, so the words of one leaf all differ."""
    for way in ("independent", "in_turn"):
        assert np.unique(words_of(1, np.int32(2), way=way)).size == ELEMENTS


BLOCK = 32  # steps for which a phase turns before it restarts


@functools.cache
def turned_over_blocks(blocks, elements):
    each_step = jax.vmap(lambda step: words_of(0, step, (elements,), way="in_turn"))
    words = each_step(np.arange(blocks * BLOCK, dtype=np.int32))
    return np.asarray(words).reshape(blocks, BLOCK, elements)


@pytest.mark.parametrize("half", ["upper half", "lower 14 bits"])
def test_a_turned_phase_fills_the_circle_evenly(half):
    """After n turns no gap is wider than 1.9 / n: the golden ratio spreads points best.

    n times the largest gap is at most 1 + 2 / sqrt(5) = 1.894.
    """
    words = turned_over_blocks(50, 16)
    for n in (2, 3, 5, 8, 13, 21, 32):
        points = np.sort(fractions(words[:, :n], half), axis=1)
        gaps = np.diff(points, axis=1, append=points[:, :1] + 1)
        # 2^-13: two ulps of the shorter half. The turn differs from the golden ratio by that much.
        assert np.max(gaps) < 1.9 / n + n * 2.0**-13


def test_every_block_of_turns_starts_in_a_new_place():
    """Blocks start in uniform, independent places, and half of them turn backwards."""
    words = turned_over_blocks(4096, 1)[..., 0]
    starts = words[:, 0]
    for shift in (8, 16, 24):
        assert_uniform((starts >> shift) & 0xFF, 256)
        a, b = (starts[:-1] >> shift) & 15, (starts[1:] >> shift) & 15
        assert_uniform(16 * a + b, 256)
    turns = np.diff(words, axis=1)  # modulo 2^32
    assert np.all(turns == turns[:, :1])
    golden = np.uint32(0x9E37278E)
    assert set(turns[:, 0]) == {golden, np.uint32(-int(golden) % 2**32)}
    # Half of 4096, within 5 standard deviations of 32.
    forwards = turns[:, 0] == golden
    assert abs(np.sum(forwards) - 2048) < 5 * 32
    assert abs(np.sum(forwards[1:] == forwards[:-1]) - 2048) < 5 * 32


def test_jit_eager_and_slices_give_bit_identical_results():
    whole = phases(3, (6, 10))
    np.testing.assert_array_equal(whole, random_bits((6, 10), key_of_leaf(jnp.uint32(3))))
    leaves = jax.vmap(lambda leaf: phases(leaf, (6, 10)))(jnp.array([3, 5], jnp.uint32))
    np.testing.assert_array_equal(leaves[0], whole)
    np.testing.assert_array_equal(phases(3, (6, 2, 5)).reshape(6, 10), whole)


def test_draws_of_all_leaves_equal_separate_draws():
    for step in (np.int32(7), np.uint32(2**32 - 1)):
        found = draws(5, jnp.asarray(step))
        for leaf, one in enumerate(found):
            for way in ("independent", "in_turn"):
                expected = words_of(leaf, step, (3, 4), way=way)
                np.testing.assert_array_equal(getattr(one, way)(jnp.zeros((3, 4))), expected)
    assert draws(0, jnp.int32(1)) == []


EIGHT_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import adam_jax
from adam_jax._rounding import random_bits

assert len(jax.devices()) == 8
mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"))
one = jax.jit(lambda: random_bits((16, 256), 3))()
optimizer = adam_jax.master_weights(adam_jax.adam(0.1, mu_dtype="int8", nu_dtype="int8"), "int8")
params = jnp.ones((16, 256), jnp.bfloat16)
gradients = jax.random.normal(jax.random.key(0), (16, 256), jnp.bfloat16)
update = jax.jit(optimizer.update)
def steps(params, gradients, state):
    for _ in range(3):
        updates, state = update(gradients, state, params)
    return updates, state
alone = steps(params, gradients, optimizer.init(params))
for spec in [("x", None), (None, "y"), ("x", "y"), (None, ("x", "y")), ()]:
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    bits = jax.jit(lambda: random_bits((16, 256), 3), out_shardings=sharding)()
    assert bits.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(one, bits)
    p, g = jax.device_put((params, gradients), sharding)
    state = jax.jit(optimizer.init)(p)
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(steps(p, g, state)), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
print("same bits")
"""


@pytest.mark.slow
def test_every_sharding_gives_the_same_bits():
    """Runs in a separate process, because it needs eight devices."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", EIGHT_DEVICES],
        env=os.environ | flags,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "same bits\n", done.stderr


def test_words_stay_the_same_in_every_version():
    """A run depends on these bits: they must not change between versions or backends."""
    words = phases(1, (4,))
    np.testing.assert_array_equal(words, [1473980502, 632994795, 3564934342, 807958247])
    words = words_of(1, jnp.int32(2), (4,), way="independent")
    np.testing.assert_array_equal(words, [2456031888, 134092593, 2061541184, 2737036989])
    words = words_of(1, jnp.int32(35), (4,), way="in_turn")
    np.testing.assert_array_equal(words, [60014721, 3513996310, 2150968561, 3688959762])


def to_bfloat16(x, bits):
    return split(x, jnp.bfloat16, width=0, bits=bits)[0]


def neighbours(x):
    """Returns the bfloat16 numbers around a float32, as float32."""
    word = np.float32(x).view(np.uint32)
    low, high = word & 0xFFFF0000, (word & 0xFFFF0000) + (0x10000 if word & 0xFFFF else 0)
    return np.uint32(low).view(np.float32), np.uint32(high).view(np.float32)


@settings(deadline=None, max_examples=200)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_stochastic_rounding_is_unbiased(x):
    """Tries each of the 65,536 values that the used half of the bits can have."""
    bits = jnp.arange(2**16, dtype=jnp.uint32) << 16
    rounded = np.asarray(to_bfloat16(jnp.full(2**16, x, jnp.float32), bits))
    low, high = neighbours(x)
    with np.errstate(over="ignore"):
        largest = np.isinf(high)
    if largest:
        assert np.unique(rounded.astype(np.float32)) == low
        return
    ups = rounded.view(np.uint16) != np.uint16(low.view(np.uint32) >> 16)
    assert np.all(rounded.view(np.uint16)[ups] == high.view(np.uint32) >> 16)
    assert np.sum(ups) == np.float32(x).view(np.uint32) & 0xFFFF


def test_rounding_keeps_every_bfloat16_number():
    patterns = np.arange(2**16, dtype=np.uint16)
    numbers = patterns.view(jnp.bfloat16).astype(np.float32)
    words = (patterns.astype(np.uint32) << 16).view(np.float32)
    for bits in (0, 2**32 - 1):
        rounded = np.asarray(to_bfloat16(jnp.asarray(words), jnp.full(2**16, bits, jnp.uint32)))
        nan = np.isnan(numbers)
        np.testing.assert_array_equal(rounded.view(np.uint16)[~nan], patterns[~nan])
        assert np.all(np.isnan(rounded[nan].astype(np.float32)))

"""Random bits, unbiased rounding, and float32 numbers split into 16 bits and a remainder."""

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

from adam_jax._rounding import centred, random_bits, split, turned

SHAPE = (512, 512)
ELEMENTS = 512 * 512


def drawn_bits(leaf=0, draw=0, shape=SHAPE):
    return np.asarray(
        jax.jit(random_bits, static_argnums=0)(shape, np.uint32(leaf), np.uint32(draw))
    )


def chi_square(counts):
    expected = counts.sum() / counts.size
    return np.sum((counts - expected) ** 2) / expected


def assert_uniform(values, categories):
    """Chi-square, whose mean is k - 1 and variance 2 (k - 1): within 5 standard deviations."""
    counts = np.bincount(np.ravel(values), minlength=categories)
    degrees = categories - 1
    assert abs(chi_square(counts) - degrees) < 5 * np.sqrt(2 * degrees)


@pytest.mark.parametrize(("leaf", "draw"), [(0, 0), (1, 0), (0, 1), (999, 123456), (2**31, 2**31)])
def test_bytes_are_uniform(leaf, draw):
    words = drawn_bits(leaf, draw)
    for shift in (0, 8, 16, 24):
        assert_uniform((words >> shift) & 0xFF, 256)


@pytest.mark.parametrize("axis", [0, 1])
def test_neighbours_are_independent(axis):
    """Pairs of four-bit digits of neighbouring elements fill all 256 cells alike."""
    words = drawn_bits(3, 7)
    a, b = np.delete(words, -1, axis), np.delete(words, 0, axis)
    for one, other in itertools.product((0, 12, 28), repeat=2):
        assert_uniform(16 * ((a >> one) & 15) + ((b >> other) & 15), 256)


@pytest.mark.parametrize(
    ("one", "other"),
    [((0, 0), (1, 0)), ((0, 0), (0, 1)), ((5, 9), (9, 5)), ((7, 100), (7, 101)), ((2, 1), (3, 0))],
)
def test_leaves_and_draws_are_independent(one, other):
    a, b = drawn_bits(*one), drawn_bits(*other)
    for shift in (0, 14, 28):
        assert_uniform(16 * ((a >> shift) & 15) + ((b >> shift) & 15), 256)
    # Nor is one the other, moved along: that would make neighbouring leaves round alike.
    assert np.intersect1d(a[:4].ravel(), b[:4].ravel()).size <= 5


def test_every_bit_is_uncorrelated_with_every_other():
    words = drawn_bits(11, 13)
    signs = np.stack([2.0 * ((words.ravel() >> k) & 1) - 1 for k in range(32)])
    correlation = signs @ signs.T / ELEMENTS
    np.testing.assert_allclose(correlation, np.eye(32), atol=5 / np.sqrt(ELEMENTS))
    shifted = signs[:, 1:] @ signs[:, :-1].T / (ELEMENTS - 1)
    np.testing.assert_allclose(shifted, 0, atol=5 / np.sqrt(ELEMENTS))


def test_steps_are_uncorrelated_where_drawn_anew():
    a = np.stack([drawn_bits(4, draw, (64, 64)).ravel() / 2.0**32 - 0.5 for draw in range(50)])
    correlation = np.asarray(np.corrcoef(a))
    off = correlation[~np.eye(50, dtype=bool)]
    assert np.max(np.abs(off)) < 6 / 64  # sqrt(4096) = 64
    assert abs(np.mean(off)) < 1e-3


def test_no_element_repeats_another():
    """A permutation of 2^32 words, so that elements of one leaf are all different."""
    assert np.unique(drawn_bits(1, 2)).size == ELEMENTS


def test_a_turned_phase_fills_the_circle_evenly():
    """After n turns no gap is wider than 2.6 / n: the golden ratio spreads points best."""
    phase = jnp.asarray(drawn_bits(shape=(16,)))
    turns = np.stack([turned(phase, jnp.int32(t)) for t in range(1, 101)]) / 2.0**32
    points = np.sort(turns, axis=0)
    gaps = np.diff(points, axis=0, append=points[:1] + 1)
    assert np.max(gaps) < 2.6 / 100


def test_the_same_bits_in_jit_and_eager_and_in_a_part_of_a_leaf():
    whole = drawn_bits(3, 4, (6, 10))
    np.testing.assert_array_equal(whole, random_bits((6, 10), 3, 4))
    rows = jax.vmap(lambda leaf: random_bits((6, 10), leaf, 4))(jnp.array([3, 5], jnp.uint32))
    np.testing.assert_array_equal(rows[0], whole)
    np.testing.assert_array_equal(drawn_bits(3, 4, (6, 2, 5)).reshape(6, 10), whole)


EIGHT_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import adam_jax
from adam_jax._rounding import random_bits

assert len(jax.devices()) == 8
mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"))
one = jax.jit(lambda: random_bits((16, 256), 3, 4))()
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
    bits = jax.jit(lambda: random_bits((16, 256), 3, 4), out_shardings=sharding)()
    assert bits.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(one, bits)
    p, g = jax.device_put((params, gradients), sharding)
    state = jax.jit(optimizer.init)(p)
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(steps(p, g, state)), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
print("same bits")
"""


@pytest.mark.slow
def test_the_same_bits_under_every_sharding():
    """In a process of its own, because it needs eight devices."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", EIGHT_DEVICES],
        env=os.environ | flags,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "same bits\n", done.stderr


def test_known_words():
    """The bits are part of what a run is: they must not change between versions or backends."""
    expected = [71150307, 3209478007, 976656231, 1767496469]
    np.testing.assert_array_equal(random_bits((2, 2), 1, 2).ravel(), expected)


def test_centred_noise():
    words = jnp.array([0, 2**9 - 1, 2**9, 2**31, 2**32 - 1], jnp.uint32)
    expected = [-0.5, -0.5, -0.5 + 2.0**-23, 0, 0.5 - 2.0**-23]
    np.testing.assert_array_equal(centred(words), expected)


def to_bfloat16(x, bits):
    return split(x, jnp.bfloat16, kept=0, bits=bits)[0]


def neighbours(x):
    """The bfloat16 numbers around a float32, as float32."""
    word = np.float32(x).view(np.uint32)
    low, high = word & 0xFFFF0000, (word & 0xFFFF0000) + (0x10000 if word & 0xFFFF else 0)
    return np.uint32(low).view(np.float32), np.uint32(high).view(np.float32)


@settings(deadline=None, max_examples=200)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_stochastic_rounding_is_exact_in_mean(x):
    """With every one of the 65,536 values that the used half of the bits can have."""
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

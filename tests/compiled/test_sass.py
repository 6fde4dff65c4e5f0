"""The counts of an H100's machine instructions agree with what a program has to compute."""

import arithmetic
import jax
import jax.numpy as jnp
import pytest
import sass
from settings import settings

X = jax.ShapeDtypeStruct((4096, 1024), jnp.float32)


def test_a_sum_has_one_addition_for_each_element():
    counts = sass.count(jax.jit(jnp.add), X, X)
    assert counts["FADD"] == X.size
    assert sass.by_kind(counts)["float"] == X.size
    # Four elements at a time: two loads and a store.
    assert (counts["LDG"], counts["STG"]) == (X.size / 2, X.size / 4)


def test_instructions_in_a_loop_count_once_for_each_iteration():
    # Each thread loops over rows. Then a warp's 32 threads take 5 maxima of their two columns each.
    counts = sass.count(jax.jit(lambda x: jnp.max(x, axis=0)), X)
    assert counts["FMNMX"] / X.size == pytest.approx(1, abs=0.05)
    assert counts["FMNMX"] >= X.size


def test_adam_has_a_root_and_a_division_for_each_element():
    setting = settings()["float32"]
    counts = arithmetic.count(setting, arithmetic.SASS)
    assert counts["special"] == pytest.approx(2, abs=1e-3)

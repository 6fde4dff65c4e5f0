"""The arithmetic that variants share: decay rates and bias corrections."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adam_jax._moments import Decay, bias_correction


@pytest.mark.parametrize("b", [0.0, 0.1, 0.5, 0.9, 0.95, 0.999, 0.99999, 0.9999999])
def test_bias_correction_agrees_with_float64(b):
    counts = np.unique(np.geomspace(1, 2**24, 200).astype(np.int64))
    actual = jax.jit(lambda t: bias_correction(Decay.of(b), t))(jnp.asarray(counts, jnp.float32))
    desired = -np.expm1(counts * np.log(b)) if b else np.ones(len(counts))
    np.testing.assert_allclose(actual, desired, rtol=3e-7)


def test_bias_correction_is_exact_for_a_traced_decay():
    b = np.float32(0.99999)
    counts = np.arange(1, 2000)
    correction = jax.jit(lambda b, t: bias_correction(Decay.of(b), t))
    actual = correction(jnp.asarray(b), jnp.asarray(counts, jnp.float32))
    # log b is computed in float32: half an ulp more than in the test above.
    desired = -np.expm1(counts * np.log(np.float64(b)))
    np.testing.assert_allclose(actual, desired, rtol=3e-7 + 2.0**-24)


@pytest.mark.parametrize("rounded", ["bfloat16", "float16"])
def test_a_decay_rounded_to_one_is_read_as_the_middle_of_its_range(rounded):
    half_an_ulp = {"bfloat16": 2.0**-9, "float16": 2.0**-12}[rounded]
    one = jnp.asarray(1 - half_an_ulp / 4, rounded)
    assert one == 1
    np.testing.assert_allclose(Decay.of(one).one_minus_b, half_an_ulp / 2, rtol=1e-6)
    np.testing.assert_allclose(Decay.of(one).log_b, np.log1p(-half_an_ulp / 2), rtol=1e-6)

"""Which models fit on which devices, by the compiler's account of whole training steps."""

import math

import jax
import numpy as np
import pytest
from memory import CAPACITY, CASES, PARTS, Case, measure, trainings
from models import MODELS

import adam_jax


@pytest.fixture(autouse=True)
def as_a_user():
    """Runs JAX with its default settings, without the strictness of these tests."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("gpt2-124m", 124_439_808),
        ("gpt2-1.5b", 1_557_611_200),
        ("llama-8b", 8_030_261_248),
        ("llama-70b", 70_553_706_496),
    ],
)
def test_models_have_the_published_numbers_of_parameters(name, published):
    assert sum(x.size for x in jax.tree.leaves(MODELS[name].params(np.float32))) == published


def outcome(case, name):
    return measure(case, MODELS[case.model], trainings(case)[name], batch=1)


def test_llama_8b_fits_one_gpu_in_5_bytes_and_not_with_optax():
    case = Case("llama-8b", "h100")
    ours, optax = outcome(case, "5 bytes"), outcome(case, "optax.adamw")
    assert ours.fits
    assert ours.peak < 45e9
    assert 0 < ours.parts["rest"] < 1e9  # nothing as large as all gradients, or a stack's copy
    assert not optax.fits
    assert optax.peak > 15 * 8.03e9
    for found in (ours, optax):
        assert sum(found.parts[part] for part in PARTS) == pytest.approx(found.peak)


def test_parts_agree_with_memory_usage():
    case = Case("llama-8b", "h100:8", zero=True)
    model, setting = MODELS[case.model], trainings(case)["5 bytes"]
    found = measure(case, model, setting, batch=1)
    one = adam_jax.memory_usage(setting, model.params(setting.dtype), layers=model.stacked)
    assert found.parts["weights"] == one.weights
    # Divided by 8, except the scales of divided rows: each device holds all of these.
    assert found.parts["gradients"] == pytest.approx(one.gradients / 8, rel=0.01)
    assert found.parts["state"] == pytest.approx(sum(one.state.values()) / 8, rel=0.01)


@pytest.mark.full
def test_the_compiler_s_refusal_is_the_result_for_a_small_chip():
    found = outcome(Case("llama-8b", "v5e"), "5 bytes")
    assert "RESOURCE_EXHAUSTED" in found.refusal
    assert not found.fits
    assert math.isnan(found.peak)


def test_every_model_and_every_device_has_a_case():
    assert {case.model for case in CASES} == MODELS.keys()
    assert {case.chip for case in CASES} == CAPACITY.keys()

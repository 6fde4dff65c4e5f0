"""Compiled for a TPU and a GPU, a step is one pass over each leaf, in place.

Each assertion reads the compiled program.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest
from settings import gpt2
from steps import SHAPES, TARGETS, faults, grid
from targets import compile_for

pytestmark = pytest.mark.usefixtures("standard_promotion")


def faults_of(target, setting, params, **options):
    state = jax.eval_shape(setting.optimizer().init, params)
    compiled = compile_for(target, setting.step(), params, state, params, **options)
    read_twice = params if setting.nu_format == "int8" else []
    return faults(compiled, params, state, read_twice)


@pytest.mark.parametrize("target", TARGETS)
def test_a_leaf_is_updated_in_one_pass(target, setting, request):
    if target == "v5e" and setting.row.name == "average_params" and setting.weights[1]:
        # Either alone takes one pass. Together both read one float32 weight, which XLA for TPU
        # stores for a second pass.
        request.applymarker(pytest.mark.xfail(strict=True, reason="two passes on a TPU"))
    assert faults_of(target, setting, setting.params()) == []


def adamw(formats=(None, None), weights=("float32", None)):
    (found,) = (
        setting
        for setting in grid()
        if (setting.row.name, setting.weights, setting.shape) == ("adamw", weights, SHAPES[0])
        and (setting.mu_format, setting.nu_format) == formats
    )
    return found


INT8 = "int8", "int8"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", [adamw(), adamw(INT8), adamw(INT8, ("bfloat16", "int8"))], ids=str)
def test_gpt2_is_updated_in_one_pass_over_each_leaf(target, kind, request):
    """124M parameters in 148 leaves; 2 of its 12 layers without --full."""
    layers = 12 if request.config.getoption("full") else 2
    if target == "v5e" and kind.nu_format == "int8":
        # Programs for single leaves have none.
        reason = "a TPU's program for many leaves has 0.2 to 0.4 bytes of temporaries per parameter"
        request.applymarker(pytest.mark.xfail(strict=True, reason=reason))
    assert faults_of(target, kind, kind.params(gpt2(768, 50257, 1024, layers))) == []


@pytest.mark.parametrize("kind", [adamw(INT8), adamw(INT8, ("bfloat16", "int8"))], ids=str)
def test_temporaries_of_many_leaves_come_from_prefetching(kind):
    """The compiler chooses to prefetch; without prefetching there are no temporaries."""
    params = kind.params(gpt2(768, 50257, 1024, 2))
    assert faults_of("v5e", kind, params, xla_vf_vmem_max_outstanding_prefetches="0") == []


# The checks find the faults that they look for.


def faults_of_broken(target, transform, setting=None, **options):
    """Returns the faults of a step that `transform` has changed."""
    setting = setting or adamw(INT8)
    params = setting.params()
    optimizer = setting.optimizer()
    state = jax.eval_shape(optimizer.init, params)

    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return transform(optax.apply_updates, params, updates, state)

    step = jax.jit(step, **{"donate_argnums": (0, 1), "keep_unused": True} | options)
    return faults(compile_for(target, step, params, state, params), params, state, params)


def as_it_should_be(apply, params, updates, state):
    return apply(params, updates), state


def with_a_barrier(apply, params, updates, state):
    """Makes the updates in one pass and adds them in another."""
    return apply(params, jax.lax.optimization_barrier(updates)), state


def with_a_norm(apply, params, updates, state):
    """Clips after the step instead of before it: all updates have to be made first."""
    norm = optax.tree.norm(updates)
    return apply(params, jax.tree.map(lambda u: u / jnp.maximum(norm, 1), updates)), state


@pytest.mark.parametrize("target", TARGETS)
def test_a_broken_fusion_is_found(target):
    assert faults_of_broken(target, as_it_should_be) == []
    for broken in (with_a_barrier, with_a_norm):
        found = faults_of_broken(target, broken)
        assert any("passes over 1 leaves of 16777216" in fault for fault in found), found


@pytest.mark.parametrize("target", TARGETS)
def test_a_missing_donation_is_found(target):
    found = faults_of_broken(target, as_it_should_be, donate_argnums=(0,))
    in_place = [fault for fault in found if "not updated in place" in fault]
    assert [fault.split()[0] for fault in in_place] == [
        "[1][0].mu[0]",
        "[1][0].nu.codes[0]",
        "[1][0].nu.scales[0]",
        "[1][0].nu.units[0]",
    ]


@pytest.mark.parametrize("target", ["h100"])
def test_temporaries_and_float64_are_found(target):
    def doubled(apply, params, updates, state):
        wide = jax.tree.map(lambda p: p.astype(jnp.float64), params)
        ordered = jax.tree.map(lambda p: jnp.sort(p, axis=0), wide)
        return apply(params, jax.tree.map(lambda u, p: u + p, updates, ordered)), state

    with jax.enable_x64(True):
        small = dataclasses.replace(adamw(), shape=(256, 512))
        found = faults_of_broken(target, doubled, small)
    assert "float64" in found
    assert any("bytes of temporaries per parameter" in fault for fault in found), found

"""Published packages that accept an optax optimizer give the same results with ours.

Each test runs a package's own code, which makes the state, calls the update and adds it.
"""

import blackjax
import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import linen
import numpy as np
import numpyro
import optax
import optimistix as optx
import pytest
from flax import nnx
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.optim import optax_to_numpyro

import adam_jax

pytestmark = pytest.mark.slow
X = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
Y = np.sin(2 * X[:, :2])


@pytest.fixture(autouse=True)
def their_promotion():
    """Lets code of other packages mix dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def assert_same(ours, theirs, learning_rate, steps):
    """Asserts that two float32 runs agree up to the rounding of this many steps.

    In each step, optax loses 1e-5 of its length in bias correction (see test_adam), and each of the
    two parameters, which are less than 2, is rounded by half an ulp.
    """
    assert jax.tree.leaves(ours)
    atol = steps * (learning_rate * 1e-5 + 2.0**-23)
    chex.assert_trees_all_close(ours, theirs, rtol=0, atol=atol)


# Networks: each function returns parameters and losses. 64 x 64 weights are enough for int8.


def train_nnx(optimizer, steps, dtype=jnp.float32):
    rngs = nnx.Rngs(0)

    def layer(n_in, n_out):
        return nnx.Linear(n_in, n_out, param_dtype=dtype, rngs=rngs)

    dropout = nnx.Dropout(0.05, rngs=rngs)
    model = nnx.Sequential(layer(8, 64), nnx.tanh, layer(64, 64), nnx.tanh, dropout, layer(64, 2))
    optimizer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, gradients = nnx.value_and_grad(lambda m: jnp.mean((m(X) - Y) ** 2))(model)
        optimizer.update(model, gradients)
        return loss

    losses = [step(model, optimizer) for _ in range(steps)]
    return nnx.state(model, nnx.Param), losses


def train_linen(optimizer, steps, dtype=jnp.float32):
    wide, wide_too, narrow = (nn.Dense(n, param_dtype=dtype) for n in (64, 64, 2))
    model = nn.Sequential([wide, nn.tanh, wide_too, nn.tanh, narrow])
    _, params, losses = linen.train(model, optimizer, X, Y, steps)
    return params, losses


def train_equinox(optimizer, steps, dtype=jnp.float32):
    model = eqx.nn.MLP(8, 2, 64, 2, jnp.tanh, dtype=dtype, key=jax.random.key(0))
    # A leaf that is no array, such as the activation, is None among the parameters.
    params, static = eqx.partition(model, eqx.is_inexact_array)
    state = optimizer.init(params)

    @eqx.filter_jit
    def step(params, state):
        loss = lambda p: jnp.mean((jax.vmap(eqx.combine(p, static))(X) - Y) ** 2)  # noqa: E731
        value, gradients = eqx.filter_value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        # eqx.apply_updates with master_weights' updates would make bfloat16 parameters float32.
        return optax.apply_updates(params, updates), state, value

    losses = []
    for _ in range(steps):
        params, state, loss = step(params, state)
        losses.append(loss)
    return params, losses


NETWORKS = {"flax nnx": train_nnx, "flax linen": train_linen, "equinox": train_equinox}
each_network = pytest.mark.parametrize("train", NETWORKS.values(), ids=NETWORKS)


@each_network
def test_a_network_learns_the_same(train):
    (ours, losses), (theirs, their_losses) = (
        train(make(1e-3, weight_decay=0.1), 30) for make in (adam_jax.adamw, optax.adamw)
    )
    assert losses[-1] < 0.7 * losses[0]
    assert_same(ours, theirs, 1e-3, 30)
    assert_same(losses, their_losses, 1e-3, 30)


@pytest.mark.full
@each_network
def test_a_network_learns_in_seven_bytes(train):
    inner = adam_jax.adam(3e-3, mu_dtype="int8", nu_dtype="int8")
    params, losses = train(adam_jax.master_weights(inner, "int8"), 150, jnp.bfloat16)
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    _, their_losses = train(optax.adam(3e-3), 150)
    # Optax in float32 reaches between 0.001 and 0.05 of the first loss, and in bfloat16 the
    # network's own results are off by that much.
    assert their_losses[-1] < 0.1 * their_losses[0]
    assert losses[-1] < 0.1 * losses[0]


# Posteriors of a linear model with noise 0.5: each function returns the mean after some steps.

PEAK = 0.03
SCHEDULE = optax.linear_schedule(PEAK, 0.0, 400)
COVARIANCE = np.linalg.inv(X.T @ X / 0.25 + np.eye(8))
MEAN = COVARIANCE @ X.T @ Y[:, 0] / 0.25


def log_density(w):
    return -jnp.sum(w**2) / 2 - jnp.sum((Y[:, 0] - X @ w) ** 2) / 0.5


def svi(optimizer, steps):
    def model():
        w = numpyro.sample("w", numpyro.distributions.Normal(jnp.zeros(8), 1).to_event(1))
        numpyro.sample("y", numpyro.distributions.Normal(X @ w, 0.5), obs=Y[:, 0])

    guide = AutoNormal(model)
    inference = SVI(model, guide, optax_to_numpyro(optimizer), Trace_ELBO(num_particles=4))
    result = inference.run(jax.random.key(0), steps, progress_bar=False)
    return guide.median(result.params)["w"]  # pyright: ignore[reportIndexIssue]: a dict


def meanfield_vi(optimizer, steps):
    algorithm = blackjax.meanfield_vi(log_density, optimizer, num_samples=4)

    @jax.jit
    def run(keys):
        step = lambda state, key: (algorithm.step(key, state)[0], None)  # noqa: E731
        return jax.lax.scan(step, algorithm.init(jnp.zeros(8)), keys)[0].mu

    return run(jax.random.split(jax.random.key(0), steps))


def minimise(optimizer, steps):
    solver = optx.OptaxMinimiser(optimizer, rtol=1e-5, atol=1e-5)
    loss = lambda w, _: -log_density(w)  # noqa: E731
    return optx.minimise(loss, solver, jnp.zeros(8), max_steps=steps, throw=False).value


POSTERIORS = {"numpyro": svi, "blackjax": meanfield_vi, "optimistix": minimise}
each_posterior = pytest.mark.parametrize("find", POSTERIORS.values(), ids=POSTERIORS)


@pytest.mark.full
@each_posterior
def test_a_posterior_is_approached_in_the_same_way(find):
    """Compares intermediate results, because all optimizers arrive at the same end."""
    ours, theirs = (find(make(SCHEDULE), 20) for make in (adam_jax.adam, optax.adam))
    assert_same(ours, theirs, PEAK, 20)
    assert np.any(np.abs(ours - MEAN) > 0.2 * np.sqrt(np.diag(COVARIANCE)))


@pytest.mark.full
@each_posterior
def test_a_posterior_is_found_with_moments_in_bfloat16(find):
    mean = find(adam_jax.adam(SCHEDULE, mu_dtype="bfloat16", nu_dtype="bfloat16"), 400)
    # A fifth of the posterior's own deviation: the steps are taken on noisy gradients.
    assert np.all(np.abs(mean - MEAN) < 0.2 * np.sqrt(np.diag(COVARIANCE)))

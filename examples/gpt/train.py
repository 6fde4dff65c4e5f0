"""The training run: steps, progress, logs and checkpoints."""

import functools
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from checkpoints import Checkpoints
from experiment import Experiment
from flax import nnx
from model import GPT, STACKED, mean_loss
from precision import Setting
from tensorboardX import SummaryWriter
from text import described, windows
from tqdm import tqdm

import adam_jax

STEPS_PER_CALL = 10  # one call makes several: on a CPU a third faster than one by one
EVALUATIONS = 10
SAVE_EVERY = 50  # steps: a killed run loses no more


class Result(NamedTuple):
    """What a training run ends with."""

    model: GPT
    losses: np.ndarray  # of each step, in nats per byte
    held_out: dict[int, float]  # loss after so many steps, at the end over the whole text
    speed: float  # tokens per second
    stored: float  # bytes per parameter of weights and optimizer state


def new_model(experiment: Experiment) -> GPT:
    """Returns a model with random weights in float32."""
    rngs = nnx.Rngs(experiment.seed)
    return GPT(experiment.layers, experiment.width, experiment.context, rngs)


def new_optimizer(experiment: Experiment, setting: Setting) -> optax.GradientTransformation:
    """Returns an optimizer whose rate warms up, then decays to 0 by the last step."""
    steps, peak = experiment.steps, experiment.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, steps // 10, steps)
    return setting.make_optimizer(experiment.variant, schedule)


def memory(experiment: Experiment, setting: Setting) -> adam_jax.MemoryUsage:
    """Counts the bytes of weights, gradients and optimizer state. Allocates nothing."""

    def params() -> Any:
        weights = nnx.to_pure_dict(nnx.state(new_model(experiment)))
        return optax.tree.cast(weights, setting.dtype)

    return adam_jax.memory_usage(
        new_optimizer(experiment, setting),
        jax.eval_shape(params),
        layers=STACKED if setting.release else False,
    )


def start(weights: Any, dtype: str, optimizer: optax.GradientTransformation) -> tuple[Any, Any]:
    """Returns the parameters in their dtype and the optimizer's state, from float32 weights."""
    params = optax.tree.cast(weights, dtype)
    state = optimizer.init(params)
    if isinstance(state, adam_jax.MasterWeightsState):  # it stores some of the bits cast away
        return adam_jax.load_master_params(weights, params, state)
    return params, state


# With donation new weights and moments overwrite the old ones: no second copy.
@functools.partial(
    jax.jit,
    static_argnames=("graph", "optimizer", "batch_shape", "release", "watched"),
    donate_argnames="carry",
)
def train_steps(
    graph: Any,
    optimizer: optax.GradientTransformation,
    batch_shape: tuple[int, int],
    carry: tuple[Any, Any],
    steps: jax.Array,
    text: jax.Array,
    key: jax.Array,
    release: bool,
    watched: bool,
) -> tuple[tuple[Any, Any], tuple[jax.Array, dict[str, jax.Array]]]:
    """Makes the numbered steps.

    Returns the parameters and the optimizer's state; and the loss of each step, with its statistics
    if it is watched.
    """
    size, length = batch_shape
    loss = functools.partial(mean_loss, graph)
    released_step = adam_jax.value_and_update(loss, optimizer, layers=STACKED)

    def step(carry: tuple[Any, Any], number: jax.Array) -> tuple[tuple[Any, Any], Any]:
        params, old_state = carry
        step_key = jax.random.fold_in(key, number)
        starts = jax.random.randint(step_key, (size, 1), 0, len(text) - length + 1)
        batch = text[starts + jnp.arange(length)]
        if release:
            value, params, state = released_step(params, old_state, batch)
            return (params, state), (value, {})
        value, gradients = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(gradients, old_state, params)
        statistics = {}
        if watched:
            statistics = adam_jax.step_statistics(updates, state, params, old_state=old_state)
        return (optax.apply_updates(params, updates), state), (value, statistics)

    return jax.lax.scan(step, carry, steps)


@functools.partial(jax.jit, static_argnames="graph")
def held_out_loss(graph: Any, params: Any, windows: jax.Array) -> jax.Array:
    """Returns the mean loss over all windows, 32 at a time."""
    losses = jax.lax.map(lambda w: mean_loss(graph, params, w[None]), windows, batch_size=32)
    return losses.mean()


def train(
    experiment: Experiment,
    setting: Setting,
    text: tuple[np.ndarray, np.ndarray],
    checkpoints: Path | None = None,
    logdir: Path | None = None,
    thinned: int = 8,
) -> Result:
    """Trains a model, or continues from the last checkpoint in a folder.

    Until the last step, the held-out loss covers one in `thinned` windows. Logs in `logdir` are for
    TensorBoard. A setting that releases gradients leaves no updates for `step_statistics`: losses
    are all that it logs.
    """
    graph, weights = nnx.split(new_model(experiment))
    optimizer = new_optimizer(experiment, setting)
    carry = start(nnx.to_pure_dict(weights), setting.dtype, optimizer)
    size = sum(leaf.size for leaf in jax.tree.leaves(carry[0]))
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(carry)) / size

    training = jnp.asarray(text[0])
    batch_shape = experiment.batch_size, experiment.context + 1
    held_out = jnp.asarray(windows(text[1], batch_shape[1]))
    key = jax.random.key(experiment.seed)
    tokens_per_step = experiment.batch_size * experiment.context

    # Only a run in which all of this is the same may continue from a checkpoint.
    run = experiment._asdict() | {"setting": setting.name, "text": described(text[0])}
    saves = Checkpoints(checkpoints, run)
    carry, progress = saves.latest(carry, {"losses": [], "held_out": [], "speeds": []})
    losses, held_out_losses, speeds = progress.values()
    saved = len(losses)
    stages = np.array_split(np.arange(experiment.steps), min(EVALUATIONS, experiment.steps))
    lengths = {stage[-1] + 1: len(stage) for stage in stages}  # by the step that ends a stage
    calls = [
        steps
        for stage in stages
        for steps in np.split(stage, range(STEPS_PER_CALL, len(stage), STEPS_PER_CALL))
        if steps[0] >= saved
    ]
    watched = logdir is not None
    # With disable=None there is no bar where it could not move, such as in a log file.
    with (
        saves,
        tqdm(
            desc=setting.name,
            total=experiment.steps * tokens_per_step,
            initial=saved * tokens_per_step,
            unit=" tokens",
            unit_scale=True,
            leave=False,
            disable=None,
        ) as bar,
        SummaryWriter(
            logdir and str(logdir), write_to_disk=watched, purge_step=saved + 1 if saved else None
        ) as writer,
    ):
        if saved:
            bar.write(f"continuing from step {saved}")
        for steps in calls:
            began = time.perf_counter()
            carry, (new, statistics) = train_steps(
                graph,
                optimizer,
                batch_shape,
                carry,
                jnp.asarray(steps),
                training,
                key,
                setting.release,
                watched,
            )
            losses.extend(np.asarray(new).tolist())
            speeds.append(len(steps) * tokens_per_step / (time.perf_counter() - began))
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update(len(steps) * tokens_per_step)
            writer.add_scalar("loss/training", losses[-1], len(losses))
            for name, values in jax.device_get(statistics).items():
                writer.add_scalar(name, values[-1], len(losses))
            if length := lengths.get(len(losses)):
                # Part of the held-out text shows how it goes, all of it is scored at the end.
                part = held_out if len(losses) == experiment.steps else held_out[::thinned]
                loss = float(held_out_loss(graph, carry[0], part))
                held_out_losses.append((len(losses), loss))
                writer.add_scalar("loss/held_out", loss, len(losses))
                bar.write(
                    f"step {len(losses):5}: training loss {np.mean(losses[-length:]):.4f}, "
                    f"held-out loss {loss:.4f}"
                )
            if len(losses) >= saved + SAVE_EVERY or len(losses) == experiment.steps:
                saves.save(len(losses), carry, progress)
                saved = len(losses)
    # The median leaves the compilation out.
    speed, by_step = float(np.median(speeds)), dict(held_out_losses)
    return Result(nnx.merge(graph, carry[0]), np.array(losses, np.float32), by_step, speed, stored)

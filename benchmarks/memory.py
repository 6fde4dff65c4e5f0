"""Peak memory of whole training steps of GPT-2 and Llama 3.1: does a model fit on a device?

    uv run --group compilers benchmarks/memory.py --model llama-8b --target h100
    uv run --group compilers --with flashoptim-jax benchmarks/memory.py
    uv run --group compilers benchmarks/memory.py --picture docs/memory.png

Compiles forward pass, backward pass and update of the models in `models.py` for H100s, v5es and
v5ps, which need not be here, and prints what the compiler sets aside on each device. No array is
made. Without options it does so for all `CASES`. A model and a target may be any two: "h100:8" are
eight GPUs, "v5p:4x4x4" 64 chips. Each of them has its part of parameters, gradients and state
(FSDP), or with --zero of the state alone (ZeRO-1).

On each device is one sequence, of 2048 tokens, or GPT-2's 1024; --batch puts more there. Layers are
recomputed in the backward pass. Matrix products are in bfloat16 in all settings. Parameters and
state are donated. "5 bytes" and "float32, released" are steps that `adam_jax.value_and_update`
makes. The columns, in GB on each device:

- peak: arguments + outputs - aliased + temporaries, by the compiler's account of the program;
- fits: of a program that needs more than a chip has, the compiler for TPUs says so and gives up;
  that message is here. (The peak of a program that it accepts may be a little more than the chip
  has: the sum above can count too much.) The one for GPUs warns and goes on: there the peak is
  compared with 95% of the GPU's memory, which is what JAX takes with
  XLA_PYTHON_CLIENT_MEM_FRACTION=.95 (otherwise it takes 75%). The rest is left to the driver, to
  CUDA's libraries and to the program;
- weights, gradients, state: counted from shapes, as by `adam_jax.memory_usage`. Gradients are those
  of all parameters, or with gradient release those of one layer and of all that is in no layer;
- activations: the input of each layer, which is kept for the backward pass;
- rest: the peak less all of these. That is what else is in use at the peak: the inside of a layer,
  logits, copies in bfloat16, what is gathered or not yet divided. It is less than nothing where
  the compiler never has all gradients at once, as when it updates the head before it has others;
- per parameter: bytes on all devices together, over the number of parameters.

The last table has the peaks alone.
"""

import contextlib
import datetime
import functools
import importlib.metadata
import importlib.util
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from models import MODELS, SMALL, Model
from scale import held, placed
from settings import RATE, Setting, with_optax
from targets import PLATFORMS, devices
from tqdm import tqdm

import adam_jax

# Bytes for data. Of an H100, 95% of what the driver reports; of TPUs, what the compiler states.
CAPACITY = {"h100": 0.95 * 84_942_979_072, "v5e": 15.75 * 2**30, "v5p": 95.74 * 2**30}
REFUSES = {"v5e", "v5p"}  # chips whose compiler itself refuses what needs more
AXIS = "data"


class Case(NamedTuple):
    """What is trained, and where."""

    model: str
    target: str
    zero: bool = False

    @property
    def chip(self) -> str:
        """The kind of the devices."""
        return self.target.partition(":")[0]

    @property
    def one(self) -> bool:
        """Whether there is one device."""
        return self.target == self.chip

    def __str__(self) -> str:
        layout = "" if self.one else ", ZeRO-1" if self.zero else ", FSDP"
        return f"{self.model}, {self.target}{layout}"


CASES = [
    Case("gpt2-124m", "h100"),
    Case("gpt2-124m", "v5e"),
    Case("gpt2-1.5b", "h100"),
    Case("gpt2-1.5b", "v5e"),
    Case("llama-8b", "h100"),
    Case("llama-8b", "v5p"),
    Case("llama-8b", "v5e:2x4"),
    Case("llama-8b", "h100:8", zero=True),
    Case("llama-70b", "h100:8"),
    Case("llama-70b", "v5p:2x2x2"),
    Case("llama-70b", "v5p:4x4x4"),
]
PICTURED = [Case("llama-8b", "h100"), Case("llama-70b", "h100:8")]
TITLES = dict(zip(PICTURED, ["Llama 3.1 8B, one H100", "Llama 3.1 70B, eight H100s"], strict=True))
TINY = [Case("gpt2", "h100"), Case("llama", "v5e:2x2"), Case("llama", "h100:8", zero=True)]
OF_TINY = ["optax.adamw", "5 bytes"]  # the settings
PARTS = {
    "weights": "#1f3b57",
    "gradients": "#5b86ad",
    "state": "#b4cde2",
    "activations": "#e69f00",
    "rest": "#d9d9d9",
}


class Training(NamedTuple):
    """A way to train."""

    setting: Setting
    released: optax.GradientTransformation | None = None  # the optimizer of a step that releases

    def step(self, model: Model) -> Callable[..., Any]:
        """From parameters, state and a batch to the loss, parameters and state."""
        if self.released:
            return adam_jax.value_and_update(model.loss, self.released, layers=model.stacked)

        def step(params: Any, state: Any, tokens: jax.Array) -> Any:
            value, gradients = jax.value_and_grad(model.loss)(params, tokens)
            return value, *self.setting.step(params, state, gradients)

        return step


class Masters(NamedTuple):
    """The state of `with_masters`."""

    weights: Any  # in float32
    state: Any


def with_masters(optimizer: optax.GradientTransformation) -> Setting:
    """Parameters and gradients in bfloat16, and weights in float32 in the state."""

    def init(params: Any) -> Masters:
        weights = optax.tree.cast(params, jnp.float32)
        return Masters(weights, optimizer.init(weights))

    def step(params: Any, state: Masters, gradients: Any) -> Any:
        wide = optax.tree.cast(gradients, jnp.float32)
        updates, inner = optimizer.update(wide, state.state, state.weights)
        weights = optax.apply_updates(state.weights, updates)
        return optax.tree.cast(weights, jnp.bfloat16), Masters(weights, inner)

    return Setting(init, step, jnp.bfloat16)


def trainings(case: Case) -> dict[str, Training]:
    """The ways to train, by name."""

    def adamw(moments: str) -> optax.GradientTransformation:
        return adam_jax.adamw(RATE, mu_dtype=moments, nu_dtype=moments)

    seven = adam_jax.master_weights(adamw("int8"), "int8")
    plain = functools.partial(with_optax, dtype=jnp.float32)
    found = {
        "optax.adamw": Training(plain(optax.adamw(RATE))),
        "optax.adamw, bfloat16, float32 masters": Training(with_masters(optax.adamw(RATE))),
    }
    # On a mesh it does not compile, or leaves open where its state lies.
    if case.one and importlib.util.find_spec("flashoptim_jax"):
        from flashoptim_jax import flash_adamw

        flash = flash_adamw(RATE, fused=case.chip == "h100")
        found["FlashOptim, like 7 bytes"] = Training(Setting(flash.init, flash.step, jnp.bfloat16))
    return found | {
        "float32": Training(plain(adamw("float32"))),
        "float32, released": Training(plain(adamw("float32")), adamw("float32")),
        "bfloat16 moments": Training(plain(adamw("bfloat16"))),
        "int8 moments": Training(plain(adamw("int8"))),
        "7 bytes": Training(with_optax(seven, jnp.bfloat16)),
        "5 bytes": Training(with_optax(seven, jnp.bfloat16), seven),
    }


class Outcome(NamedTuple):
    """What a step takes on each device."""

    parts: dict[str, float]  # bytes; without the rest, if there is no peak
    peak: float = np.nan
    refusal: str = ""  # what the compiler says, if there is no peak
    fits: bool = False
    size: int = 0  # parameters
    devices: int = 1


def divided(model: Model, params: Any, mesh: Mesh) -> Any:
    """Where parameters lie with FSDP: divided by the first dimension that can be, but no layers."""

    def of_leaf(x: Any, stacked: bool) -> NamedSharding:
        dims = range(int(stacked), x.ndim)
        first = next((dim for dim in dims if x.shape[dim] % mesh.size == 0), None)
        return NamedSharding(
            mesh, PartitionSpec(*(AXIS if d == first else None for d in range(x.ndim)))
        )

    return {
        name: jax.tree.map(functools.partial(of_leaf, stacked=stacked), params[name])
        for name, stacked in model.stacked.items()
    }


def gradient_bytes(case: Case, model: Model, params: Any, released: bool) -> int:
    """The bytes of a device's part of the gradients, which depend on no optimizer's state."""
    adam = adam_jax.adam(RATE)
    where = adam_jax.state_shardings(
        adam, params, axis=AXIS if case.zero else None, layers=model.stacked
    )
    layers = model.stacked if released else False
    return adam_jax.memory_usage(adam, params, shardings=where, layers=layers).gradients


def measure(case: Case, model: Model, training: Training, batch: int) -> Outcome:
    """Compiles the step, and takes the peak apart."""
    chips = devices(case.target)[: 1 if case.one else None]
    # Where nothing is divided, nobody needs to say where arrays meet.
    kind = AxisType.Auto if case.one else AxisType.Explicit
    mesh = Mesh(np.array(chips), (AXIS,), axis_types=(kind,))
    whole = NamedSharding(mesh, PartitionSpec())
    params = model.params(training.setting.dtype)
    where = divided(model, params, mesh)
    if case.one or case.zero:
        where = jax.tree.map(lambda _: whole, where)
    params = placed(params, where)
    state = jax.eval_shape(training.setting.init, params)
    state_where = jax.tree.map(lambda _: whole, state)
    if not case.one:
        axis = AXIS if case.zero else None
        state_where = adam_jax.state_shardings(
            training.setting, params, axis=axis, layers=model.stacked
        )
    state = placed(state, state_where)
    tokens = jax.ShapeDtypeStruct(
        (batch * mesh.size, model.length + 1),
        jnp.int32,
        sharding=NamedSharding(mesh, PartitionSpec(AXIS)),
    )
    jitted = jax.jit(
        training.step(model), donate_argnums=(0, 1), out_shardings=(whole, where, state_where)
    )
    parts: dict[str, float] = {
        "weights": held(params),
        "gradients": gradient_bytes(case, model, params, bool(training.released)),
        "state": held(state),
        "activations": 2 * model.layers * batch * model.length * model.width,
    }
    size = sum(x.size for x in jax.tree.leaves(params))
    outcome = Outcome(parts, size=size, devices=mesh.size)
    jax.clear_caches()
    try:
        with contextlib.nullcontext() if case.one else jax.set_mesh(mesh):
            traced = jitted.trace(params, state, tokens)
            compiled = traced.lower(lowering_platforms=(PLATFORMS[case.chip],)).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return outcome._replace(refusal=str(error).splitlines()[0])
    memory = compiled.memory_analysis()
    assert memory is not None, "this backend does not count memory"
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes
    peak += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    return outcome._replace(
        parts=parts | {"rest": peak - sum(parts.values())},
        peak=peak,
        fits=case.chip in REFUSES or peak <= CAPACITY[case.chip],
    )


def row(outcome: Outcome) -> list[str]:
    """The cells of a table for an outcome."""
    parts = [gigabytes(outcome.parts.get(part, np.nan)) for part in PARTS]
    verdict = outcome.refusal or ("yes" if outcome.fits else "no")
    each = outcome.peak * outcome.devices / outcome.size
    return [gigabytes(outcome.peak), verdict, *parts, "" if np.isnan(each) else f"{each:.2f}"]


def gigabytes(size: float) -> str:
    """A size of a table; nothing for what is not known."""
    return "" if np.isnan(size) else f"{size / 1e9:.2f}"


def brief(outcome: Outcome | None) -> str:
    """An outcome in one cell."""
    if outcome is None:
        return ""
    if outcome.refusal:
        return "no"
    size = f"{outcome.peak / 1e9:.1f}"
    return size if outcome.fits else f"no: {size}"


def versions() -> str:
    """What compiles."""
    names = "jax", "libtpu", "jax-cuda12-pjrt", "optax"
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def draw_case(axes: Axes, case: Case, outcomes: dict[str, Outcome], names: list[str]) -> None:
    """A bar for each setting, of the parts one after the other, and where the memory ends."""
    rows = [names.index(name) for name in outcomes]
    peaks = np.array([outcome.peak for outcome in outcomes.values()]) / 1e9
    left = np.zeros(len(peaks))
    for part, color in PARTS.items():
        sizes = np.array([max(0.0, x.parts.get(part, 0.0)) for x in outcomes.values()]) / 1e9
        # Where the rest is less than nothing, a bar ends at the peak all the same.
        widths = np.minimum(sizes, peaks - left)
        axes.barh(rows, widths, left=left, height=0.65, color=color, label=part)
        left += widths
    limit = CAPACITY[case.chip] / 1e9
    axes.axvline(limit, color="#d55e00", linewidth=1.5)
    axes.text(
        limit, -0.6, f" {limit:.1f} available", color="#d55e00", va="bottom", fontsize="small"
    )
    for place, peak in zip(rows, peaks, strict=True):
        label = axes.text(peak + 1.5, place, f"{peak:.1f}", va="center", fontsize="small")
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    axes.set(
        xlabel="GB on each device",
        xlim=(0, 1.12 * peaks.max()),
        ylim=(len(names) - 0.5, -0.6),
        yticks=range(len(names)),
        yticklabels=names,
    )
    axes.set_title(TITLES.get(case, str(case)), loc="left", fontsize="large", pad=18)
    axes.spines[["top", "right"]].set_visible(False)


def draw(found: dict[Case, dict[str, Outcome]], names: list[str], path: Path) -> None:
    """Draws cases into a PNG, on white: it stands on light and on dark pages."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, (case, outcomes) in zip(panels, found.items(), strict=True):
        draw_case(axes, case, outcomes, names)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(PARTS), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def parse_arguments() -> tuple[Namespace, list[Case]]:
    """The command line, and the cases that it asks for."""
    parser = ArgumentParser(
        description="Compiles training steps of GPT-2 and Llama 3.1, and prints the memory that "
        "each device needs. Without options: a selection of models and devices.",
    )
    add = parser.add_argument
    add("--model", choices=MODELS, help="default: those of the selection")
    add("--target", metavar="T", help="h100, v5e, v5p; or several, such as h100:8, v5p:2x2x2")
    add("--zero", action="store_true", help="divide the state alone (ZeRO-1), not parameters too")
    add("--setting", action="append", metavar="NAME", help="more than once for several; or all")
    add("--batch", type=int, default=1, metavar="N", help="sequences on each device")
    add("--small", action="store_true", help="small models, to see that this runs")
    add("--picture", type=Path, metavar="PATH", help="draw it, by default of two cases alone")
    options = parser.parse_args()
    model, target = options.model, options.target
    if target and target.partition(":")[0] not in CAPACITY:
        parser.error(f"argument --target: must begin with one of {', '.join(CAPACITY)}")
    if options.batch < 1:
        parser.error(f"argument --batch: must be at least 1, got {options.batch}")
    if options.small:
        cases = TINY
        options.setting = OF_TINY
    elif model and target:
        cases = [Case(model, target, options.zero)]
    else:
        cases = [
            case
            for case in (PICTURED if options.picture else CASES)
            if model in (None, case.model) and target in (None, case.target)
            if case.zero or not options.zero
        ]
        if not cases:
            parser.error("none of the selection; give both --model and --target")
    known = trainings(PICTURED[0])
    for name in options.setting or []:
        if name not in known:
            parser.error(f"argument --setting: must be one of {', '.join(known)}; got {name}")
    return options, cases


def main() -> None:
    """Prints tables in markdown; progress goes to stderr."""
    options, cases = parse_arguments()
    jax.config.update("jax_platforms", "cpu")  # or JAX would look for the device itself
    chosen = {
        case: {
            name: training
            for name, training in trainings(case).items()
            if options.setting is None or name in options.setting
        }
        for case in cases
    }
    print(f"{datetime.date.today()}, {versions()}\n")
    found: dict[Case, dict[str, Outcome]] = {}
    with tqdm(total=sum(map(len, chosen.values()))) as progress:
        for case, ways in chosen.items():
            model = (MODELS | SMALL)[case.model]
            found[case] = {}
            head = [str(case), "peak", "fits", *PARTS, "per parameter"]
            print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
            for name, training in ways.items():
                progress.set_postfix_str(f"{case}: {name}")
                found[case][name] = outcome = measure(case, model, training, options.batch)
                print(f"| {' | '.join([name, *row(outcome)])} |", flush=True)
                progress.update()
            print()
    names = list(dict.fromkeys(name for outcomes in found.values() for name in outcomes))
    print(f"| peak, GB | {' | '.join(names)} |\n|{'---|' * (1 + len(names))}")
    for case, outcomes in found.items():
        print(f"| {case} | {' | '.join(brief(outcomes.get(name)) for name in names)} |")
    if options.picture:
        draw(found, names, options.picture)
        print(f"\npicture: {options.picture}")


if __name__ == "__main__":
    main()

"""Peak memory of whole training steps of GPT-2 and Llama 3.1: does a model fit on a device?

    uv run --group compilers benchmarks memory --model llama-8b --target h100
    uv run --group compilers --with flashoptim-jax benchmarks memory
    uv run --group compilers --with flashoptim-jax benchmarks memory --picture docs/memory.png

Compiles forward pass, backward pass and update of the models in `models.py` for H100s, v5es and
v5ps, without any of them, and prints the memory that the compiler reserves on each device. No array
is made. Without options it compiles all `CASES`. Any model goes with any target: "h100:8" are eight
GPUs, "v5p:4x4x4" 64 chips. Each device has its part of parameters, gradients and state (FSDP), or
with --zero of the state alone (ZeRO-1).

Each device has one sequence, of 2048 tokens, or GPT-2's 1024; --batch puts more there. The backward
pass recomputes layers. Matrix products are in bfloat16 in all settings. Parameters and state are
donated. The settings are AdamW's of `settings.py`; "optax.adamw, bfloat16, float32 masters" has
bfloat16 weights and gradients and keeps float32 weights in its state. The columns, in GB on each
device:

- peak: arguments + outputs - aliased + temporaries, by the compiler's account of the program;
- fits: the compiler for TPUs rejects a program that needs more than a chip has; its message is
  here. (The peak of a program that it accepts may be a little more than the chip has: the sum above
  can count too much.) The compiler for GPUs only warns: there the peak is compared with 95% of the
  GPU's memory, which JAX uses with XLA_PYTHON_CLIENT_MEM_FRACTION=.95 (its default is 75%). The
  rest is for the driver, for CUDA's libraries and for the program;
- weights, gradients, state: counted from shapes, as by `adam_jax.memory_usage`. Gradients are those
  of all parameters, or with gradient release those of one layer and of all leaves outside layers;
- activations: the input of each layer, which the backward pass needs;
- rest: the peak less all of these: the inside of a layer, logits, copies in bfloat16, arrays that
  are gathered or not yet divided. It is negative where the compiler never has all gradients at one
  time, for instance when it updates the head before it computes the others;
- bytes per parameter: the peaks of all devices together, over the number of parameters.

The last table has the peaks alone.
"""

import contextlib
import datetime
import functools
import importlib.metadata
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from command import only_compile, parser
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from models import MODELS, SMALL, Model
from settings import RATE, Setting, settings, with_release
from tables import head, line, table
from targets import compile_for, count, devices, memory, nbytes, placed, refusal
from tqdm import tqdm

import adam_jax

# Bytes for data. Of an H100, 95% of what the driver reports; of TPUs, what the compiler states.
CAPACITY = {"h100": 0.95 * 84_942_979_072, "v5e": 15.75 * 2**30, "v5p": 95.74 * 2**30}
REFUSES = {"v5e", "v5p"}  # chips whose compiler itself refuses what needs more
AXIS = "data"


class Case(NamedTuple):
    """A model, and the devices that train it."""

    model: str
    target: str
    zero: bool = False

    @property
    def chip(self) -> str:
        """Returns the kind of the devices."""
        return self.target.partition(":")[0]

    @property
    def one(self) -> bool:
        """Tells whether there is one device."""
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
FLASH = "FlashOptim, 7 bytes"
NAMES = ["optax.adamw", "optax.adamw, bfloat16, float32 masters", FLASH]
NAMES += ["float32", "float32, released", "bfloat16 moments", "int8 moments", "7 bytes", "5 bytes"]
PICTURED = [Case("llama-8b", "h100"), Case("llama-70b", "h100:8")]
TITLES = dict(
    zip(PICTURED, ["Llama 3.1 8B on one H100", "Llama 3.1 70B on eight H100s"], strict=True)
)
SMALL_CASES = [Case("gpt2", "h100"), Case("llama", "v5e:2x2"), Case("llama", "h100:8", zero=True)]
OF_SMALL = ["optax.adamw", "5 bytes"]  # the settings
PARTS = {
    "weights": "#0072b2",
    "gradients": "#e69f00",
    "state": "#66b59a",
    "activations": "#777777",
    "rest": "#d0d0d0",
}


class Masters(NamedTuple):
    """The state of `with_masters`."""

    weights: Any  # in float32
    state: Any


def with_masters(optimizer: optax.GradientTransformation) -> Setting:
    """Returns a setting with bfloat16 weights and gradients, and float32 weights in its state."""

    def init(params: Any) -> Masters:
        weights = optax.tree.cast(params, jnp.float32)
        return Masters(weights, optimizer.init(weights))

    def step(params: Any, state: Masters, gradients: Any) -> Any:
        wide = optax.tree.cast(gradients, jnp.float32)
        updates, inner = optimizer.update(wide, state.state, state.weights)
        weights = optax.apply_updates(state.weights, updates)
        return optax.tree.cast(weights, jnp.bfloat16), Masters(weights, inner)

    return Setting(init, step, jnp.bfloat16)


def trainings(case: Case) -> dict[str, Setting]:
    """Returns the settings of a case, by name."""
    found = with_release(settings("adamw", fused=case.chip == "h100"))
    found["optax.adamw, bfloat16, float32 masters"] = with_masters(optax.adamw(RATE))
    # On a mesh, FlashOptim does not compile, or leaves open where its state lies.
    return {name: found[name] for name in NAMES if name in found and (case.one or name != FLASH)}


class Outcome(NamedTuple):
    """The memory of a step on each device."""

    parts: dict[str, float]  # bytes; without the rest, if there is no peak
    peak: float = np.nan
    refusal: str = ""  # the compiler's message, if there is no peak
    fits: bool = False
    parameters: int = 0
    devices: int = 1


def divided(model: Model, params: Any, mesh: Mesh) -> Any:
    """Returns FSDP's shardings: by the first dimension that can be divided, but not by layers."""

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
    """Returns the bytes of a device's part of the gradients; the optimizer makes no difference."""
    adam = adam_jax.adam(RATE)
    where = adam_jax.state_shardings(
        adam, params, axis=AXIS if case.zero else None, layers=model.stacked
    )
    layers = model.stacked if released else False
    return adam_jax.memory_usage(adam, params, shardings=where, layers=layers).gradients


def measure(case: Case, model: Model, setting: Setting, batch: int) -> Outcome:
    """Compiles the step, and splits the peak into parts."""
    chips = devices(case.target)[: 1 if case.one else None]
    # With explicit axes the model would have to place arrays that are not divided.
    kind = AxisType.Auto if case.one else AxisType.Explicit
    mesh = Mesh(np.array(chips), (AXIS,), axis_types=(kind,))
    whole = NamedSharding(mesh, PartitionSpec())
    params = model.params(setting.dtype)
    where = divided(model, params, mesh)
    if case.one or case.zero:
        where = jax.tree.map(lambda _: whole, where)
    params = placed(params, where)
    state = jax.eval_shape(setting.init, params)
    state_where = jax.tree.map(lambda _: whole, state)
    if not case.one:
        axis = AXIS if case.zero else None
        state_where = adam_jax.state_shardings(setting, params, axis=axis, layers=model.stacked)
    state = placed(state, state_where)
    tokens = jax.ShapeDtypeStruct(
        (batch * mesh.size, model.length + 1),
        jnp.int32,
        sharding=NamedSharding(mesh, PartitionSpec(AXIS)),
    )
    jitted = jax.jit(
        setting.train_step(model.loss, layers=model.stacked),
        donate_argnums=(0, 1),
        out_shardings=(whole, where, state_where),
    )
    parts: dict[str, float] = {
        "weights": nbytes(params),
        "gradients": gradient_bytes(case, model, params, setting.released),
        "state": nbytes(state),
        "activations": 2 * model.layers * batch * model.length * model.width,
    }
    outcome = Outcome(parts, parameters=count(params), devices=mesh.size)
    jax.clear_caches()
    try:
        with contextlib.nullcontext() if case.one else jax.set_mesh(mesh):
            peak = memory(compile_for(case.target, jitted, params, state, tokens)).peak
    except jax.errors.JaxRuntimeError as error:
        return outcome._replace(refusal=refusal(error))
    return outcome._replace(
        parts=parts | {"rest": peak - sum(parts.values())},
        peak=peak,
        fits=case.chip in REFUSES or peak <= CAPACITY[case.chip],
    )


def row(outcome: Outcome) -> list[str]:
    """Returns the cells of an outcome's row."""
    parts = [gigabytes(outcome.parts.get(part, np.nan)) for part in PARTS]
    verdict = outcome.refusal or ("yes" if outcome.fits else "no")
    each = outcome.peak * outcome.devices / outcome.parameters
    return [gigabytes(outcome.peak), verdict, *parts, "" if np.isnan(each) else f"{each:.2f}"]


def gigabytes(size: float) -> str:
    """Writes a size in GB, or nothing if it is unknown."""
    return "" if np.isnan(size) else f"{size / 1e9:.2f}"


def brief(outcome: Outcome | None) -> str:
    """Writes an outcome in one cell."""
    if outcome is None:
        return ""
    if outcome.refusal:
        return "no"
    size = f"{outcome.peak / 1e9:.1f}"
    return size if outcome.fits else f"no: {size}"


def versions() -> str:
    """Names the versions of the compilers."""
    names = "jax", "libtpu", "jax-cuda12-pjrt", "optax"
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def draw_case(axes: Axes, case: Case, outcomes: dict[str, Outcome], names: list[str]) -> None:
    """Draws a bar of parts for each setting, and a line where the memory ends."""
    rows = [names.index(name) for name in outcomes]
    peaks = np.array([outcome.peak for outcome in outcomes.values()]) / 1e9
    left = np.zeros(len(peaks))
    for part, color in PARTS.items():
        sizes = np.array([max(0.0, x.parts.get(part, 0.0)) for x in outcomes.values()]) / 1e9
        # A bar ends at the peak even where the rest is negative.
        widths = np.minimum(sizes, peaks - left)
        axes.barh(rows, widths, left=left, height=0.65, color=color, label=part)
        left += widths
    limit = CAPACITY[case.chip] / 1e9
    axes.axvline(limit, color="#d55e00", linewidth=1.5)
    axes.text(limit, -0.6, f"{limit:.1f} available", color="#d55e00", va="bottom", ha="center")
    for place, peak in zip(rows, peaks, strict=True):
        label = axes.text(peak + 1.5, place, f"{peak:.1f}", va="center")
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    axes.set(
        xlabel="GB on each device",
        xlim=(0, 1.15 * peaks.max()),
        ylim=(len(names) - 0.5, -0.6),
        yticks=range(len(names)),
        yticklabels=names,
    )
    axes.set_title(TITLES.get(case, str(case)), loc="left", fontsize="large", pad=18)
    axes.spines[["top", "right"]].set_visible(False)


def draw(found: dict[Case, dict[str, Outcome]], names: list[str], path: Path) -> None:
    """Draws cases into a PNG, on white, for light and dark pages."""
    figure = Figure(figsize=(6.4, 4.1 * len(found)), layout="constrained")
    panels = figure.subplots(len(found), 1, squeeze=False)[:, 0]
    for axes, (case, outcomes) in zip(panels, found.items(), strict=True):
        draw_case(axes, case, outcomes, names)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def parse_arguments() -> tuple[Namespace, list[Case]]:
    """Parses the command line, and returns the cases that it asks for as well."""
    arguments = parser("memory", __doc__)
    add = arguments.add_argument
    add("--model", choices=MODELS, help="default: those of the selection")
    add("--target", metavar="T", help="h100, v5e, v5p; or several, such as h100:8, v5p:2x2x2")
    add("--zero", action="store_true", help="divide the state alone (ZeRO-1), not parameters too")
    add("--setting", action="append", metavar="NAME", help="more than once for several; or all")
    add("--batch", type=int, default=1, metavar="N", help="sequences on each device")
    add("--picture", type=Path, metavar="PATH", help="draw it, by default of two cases alone")
    options = arguments.parse_args()
    model, target = options.model, options.target
    if target and target.partition(":")[0] not in CAPACITY:
        arguments.error(f"argument --target: must begin with one of {', '.join(CAPACITY)}")
    if options.batch < 1:
        arguments.error(f"argument --batch: must be at least 1, got {options.batch}")
    if options.small:
        cases = SMALL_CASES
        options.setting = OF_SMALL
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
            arguments.error("none of the selection; give both --model and --target")
    known = trainings(PICTURED[0])
    for name in options.setting or []:
        if name not in known:
            arguments.error(f"argument --setting: must be one of {', '.join(known)}; got {name}")
    return options, cases


def main() -> None:
    """Prints a table for each case, row by row, then one of all peaks."""
    options, cases = parse_arguments()
    only_compile()
    chosen = {
        case: {
            name: setting
            for name, setting in trainings(case).items()
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
            columns = ["peak", "fits", *PARTS, "bytes per parameter"]
            print(head(f"{case}, GB", columns), flush=True)
            for name, setting in ways.items():
                progress.set_postfix_str(f"{case}: {name}")
                found[case][name] = outcome = measure(case, model, setting, options.batch)
                print(line(name, row(outcome)), flush=True)
                progress.update()
            print()
    names = list(dict.fromkeys(name for outcomes in found.values() for name in outcomes))
    peaks = {
        str(case): [brief(outcomes.get(name)) for name in names] for case, outcomes in found.items()
    }
    print(table("peak, GB", names, peaks))
    if options.picture:
        draw(found, names, options.picture)
        print(f"\npicture: {options.picture}")


if __name__ == "__main__":
    main()

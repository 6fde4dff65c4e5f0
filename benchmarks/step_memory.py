"""Draws the memory in use over a training step, plain and with gradient release.

    uv run --group compilers benchmarks step_memory
    uv run --group compilers benchmarks step_memory --setting float32 --output float32.png

Compiles both steps of `release.py` for an H100, without an H100: 16 layers of a GPT, stacked and
scanned, with `jax.checkpoint` around each, for 128 tokens. Parameters and state are donated.
Nothing runs. The picture shows what XLA records while it compiles: the order of the instructions,
the first and the last instruction of each value's life, and its place in memory.

- Upward is the memory in use at an instruction, divided by the number of parameters. Bytes that
  several values share, such as a result that is written over its operand, count once.
- To the right are the instructions, in the order in which the device starts them. Those that move
  no data, such as `bitcast`, are left out. A loop's body appears once, although it runs once for
  each layer. The axis is not time.
- Parameters and state are the program's arguments. The new ones are written over them, so they are
  in use throughout. The batch, which is small, counts among them.
- Gradients are values outside of the arguments with the shape of a stack of matrices, and matrix
  products, or partial sums of them, that are the gradient of one layer's matrix. The gradients of
  vectors are small, and count among the rest.
- The rest is what the forward pass saves, intermediate values and, with gradient release, a layer's
  new parameters and state before they are written over the old ones.

The table has the parts at the instruction where most memory is in use, their sum, and the memory
that the compiler reserves by its own account.
"""

import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from command import only_compile, parser
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from release import MODELS, SMALL, arguments, both_steps
from settings import RELEASED, settings
from tables import table
from targets import compile_for, count, memory

TARGET = "h100"
TITLES = {
    "plain": "A plain step has all gradients at once",
    "released": "Gradient release has one layer's at a time",
}
BACKWARD = {"plain": "backward scan", "released": "backward scan with updates"}
PARTS = {
    "weights and state": "#8fc3de",
    "gradients": "#e69f00",
    "other temporaries": "#555555",
}
# Instructions that move no data.
FREE = {"bitcast", "constant", "get-tuple-element", "parameter", "tuple"}
Interval = tuple[int, int]
Shape = tuple[int, ...]


class Instruction(NamedTuple):
    """An instruction of the compiled program."""

    computation: str
    opcode: str
    origin: str  # the name of the operation that it was in JAX
    called: list[str]  # the condition and the body of a loop


class Value(NamedTuple):
    """A value with its place in memory."""

    name: str  # of its instruction
    shape: Shape
    place: Interval  # its addresses, in which allocations lie one after the other
    life: Interval  # its first and last instruction
    argument: bool


class Curves(NamedTuple):
    """A step's curves."""

    parts: dict[str, np.ndarray]  # bytes per parameter at each instruction
    scans: list[Interval]  # where the loops are
    allocated: float  # bytes per parameter that the compiler reserves


def read_program(text: str) -> dict[str, Instruction]:
    """Reads the instructions of all computations, by name, from a compiled program's text."""
    program: dict[str, Instruction] = {}
    computation = ""
    for line in text.splitlines():
        if begin := re.match(r"(?:ENTRY )?%(\S+) \(.*\{$", line):
            computation = begin[1]
        elif found := re.match(r"  (?:ROOT )?%(\S+) = (?:\(.*?\)|\S+) ([\w-]+)\(", line):
            origin = re.search(r'op_name="([^"]*)"', line)
            called = re.findall(r"(?:condition|body)=%([^,\s]+)", line)
            program[found[1]] = Instruction(
                computation, found[2], origin[1] if origin else "", called
            )
    return program


def read_lives(text: str) -> tuple[list[str], dict[str, Interval]]:
    """Reads the instructions' names in order, and the first and last one of each value's life."""
    order = re.findall(r"^    \d+:(\S+)$", text, re.MULTILINE)
    lives = re.findall(r"^    (\S+):(\d+)-(\d+)$", text, re.MULTILINE)
    return order, {value: (int(first), int(last)) for value, first, last in lives}


def read_values(text: str, lives: dict[str, Interval]) -> list[Value]:
    """Reads the values of a buffer assignment that live for some instructions."""
    values: list[Value] = []
    begin = end = 0
    argument = False
    for line in text.splitlines():
        if allocation := re.match(r"allocation \d+: size (\d+), (.*)", line):
            begin, end = end, end + int(allocation[1])
            argument = allocation[2].startswith("parameter ")
        elif found := re.match(
            r" value: <\d+ (\S+?)(\{[\d,]*\})? .*\(size=(\d+),offset=(\d+)\): (\S+)", line
        ):
            name, index, size, offset, kind = found.groups()
            if life := lives.get(name + (index or "{}")):
                dims = re.match(r"\w+\[([\d,]+)\]", kind)  # a tuple has none
                shape = tuple(map(int, dims[1].split(","))) if dims else ()
                place = begin + int(offset), begin + int(offset) + int(size)
                values.append(Value(name, shape, place, life, argument))
    return values


def find_scans(program: dict[str, Instruction], order: list[str]) -> list[Interval]:
    """Returns the first and last instruction of each loop over layers."""
    scans = []
    for last, name in enumerate(order):
        if program[name].opcode == "while":
            within = [program[other].computation in program[name].called for other in order]
            scans.append((within.index(True), last))
    assert len(scans) == 2, "not a forward and a backward loop"
    return scans


def find_gradients(
    values: list[Value], program: dict[str, Instruction], stacks: set[Shape]
) -> list[Value]:
    """Returns the gradients, of all layers or of one, among values that are no arguments."""
    layers = {shape[1:] for shape in stacks}
    # JAX gives this name to the product that is the gradient of a matrix.
    products = {name for name in program if program[name].origin.endswith("/transpose")}
    found = [v for v in values if v.shape[-2:] in layers and v.name in products]
    assert {value.shape[-2:] for value in found} == layers, "not a gradient for each matrix"
    return found + [value for value in values if value.shape in stacks]


def covered(places: Iterable[Interval]) -> int:
    """Returns the number of bytes that some intervals cover."""
    count = reached = 0
    for begin, end in sorted(places):
        count += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return count


def in_use(values: list[Value], steps: list[int]) -> np.ndarray:
    """Returns the bytes of the values that live at each of some instructions."""
    alive = lambda i: (v.place for v in values if v.life[0] <= i <= v.life[1])  # noqa: E731
    return np.array([covered(alive(i)) for i in steps])


def measure(step: Any, params: Any, state: Any, batch: Any) -> Curves:
    """Compiles a step and reads what the compiler records."""
    with tempfile.TemporaryDirectory() as folder:
        compiled = compile_for(TARGET, step, params, state, batch, xla_dump_to=folder)

        def recorded(ending: str) -> str:
            (path,) = Path(folder).glob(f"*after_optimizations{ending}.txt")
            return path.read_text()

        program = read_program(recorded(""))
        order, lives = read_lives(recorded("-live-range"))
        values = read_values(recorded("-buffer-assignment"), lives)
    stacks = {x.shape for x in jax.tree.leaves(params) if x.ndim > 2}
    others = [value for value in values if not value.argument]
    gradients = find_gradients(others, program, stacks)
    steps = [i for i, name in enumerate(order) if program[name].opcode not in FREE]
    size = count(params)
    found = memory(compiled)
    gradient, other = in_use(gradients, steps), in_use(others, steps)
    # The compiler does not count a few scalars of outputs and constants.
    assert found.arguments + other.max() < found.peak + 1024, "more in use than there is"
    bands = np.full(len(steps), found.arguments), gradient, other - gradient
    position = lambda i: int(np.searchsorted(steps, i))  # noqa: E731
    scans = [(position(first), position(last)) for first, last in find_scans(program, order)]
    parts = {part: band / size for part, band in zip(PARTS, bands, strict=True)}
    return Curves(parts, scans, found.peak / size)


def at_peak(curves: Curves) -> dict[str, float]:
    """Returns the parts, in bytes per parameter, at the instruction with most in use."""
    place = np.argmax(sum(curves.parts.values()))
    return {part: float(band[place]) for part, band in curves.parts.items()}


def peak(curves: Curves) -> float:
    """Returns the most bytes per parameter that are in use at one time."""
    return sum(at_peak(curves).values())


def draw_step(axes: Axes, name: str, curves: Curves, layers: int, top: float) -> None:
    """Stacks the parts, and marks the program's sections above them."""
    bands = [np.append(band, band[-1]) for band in curves.parts.values()]
    end = len(bands[0]) - 1
    at = range(end + 1)
    axes.stackplot(
        at, bands, labels=list(PARTS), colors=list(PARTS.values()), step="post", linewidth=0
    )
    forward, backward = curves.scans
    draw_section(axes, forward, top, f"forward scan\n{layers} times")
    draw_section(axes, backward, top, f"{BACKWARD[name]}\n{layers} times")
    if name == "plain":
        draw_section(axes, (backward[1], end), top, "update\nonce")
    highest = peak(curves)
    axes.axhline(highest, color="#222222", linewidth=0.8, linestyle=(0, (4, 3)))
    axes.text(sum(backward) / 2, highest, f"peak {highest:.2f}", ha="center", va="bottom")
    axes.set_title(TITLES[name], loc="left", fontsize="large", pad=10)
    axes.set(xlim=(0, 1.01 * end), ylim=(0, 1.2 * top))
    axes.spines[["top", "right"]].set_visible(False)


def draw_section(axes: Axes, section: Interval, top: float, label: str) -> None:
    """Draws a labelled bracket over some instructions, with thin lines down from its ends."""
    begin, end = section
    height = 1.09 * top
    axes.vlines(section, 0, height, color="#222222", linewidth=0.5, alpha=0.5)
    axes.hlines(height, begin, end, color="#222222", linewidth=1.2)
    axes.text((begin + end) / 2, 1.1 * top, label, ha="center", va="bottom", fontsize="small")


def draw(steps: dict[str, Curves], layers: int, path: Path) -> None:
    """Draws all steps into a PNG, on white, for light and dark pages."""
    figure = Figure(figsize=(6, 7), layout=ConstrainedLayoutEngine(hspace=0.04))
    top = max(peak(curves) for curves in steps.values())
    panels = figure.subplots(len(steps), 1, sharey=True)
    for axes, (name, curves) in zip(panels, steps.items(), strict=True):
        draw_step(axes, name, curves, layers, top)
        axes.set_ylabel("bytes per parameter")
    panels[-1].set_xlabel("instructions of the compiled program, in order")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Compiles both steps, draws them and prints a table."""
    options = parser("step_memory", __doc__)
    add = options.add_argument
    add("--setting", choices=RELEASED, default="7 bytes", help="default: %(default)s")
    picture = Path(__file__).parent.parent / "docs" / "step_memory.png"
    add("--output", type=Path, default=picture, metavar="PATH", help="default: %(default)s")
    options = options.parse_args()
    only_compile()
    jax.config.update("jax_enable_compilation_cache", False)  # a cached program records nothing
    model, layers = (SMALL["mlp"], 4) if options.small else (MODELS["gpt"], 16)
    setting = settings("adamw")[options.setting]
    args = arguments(model, layers, setting)
    steps = {
        name: measure(step, *args)
        for name, step in both_steps(model.loss, setting.optimizer).items()
    }
    draw(steps, layers, options.output)
    rows = {}
    for name, curves in zip(
        (options.setting, RELEASED[options.setting]), steps.values(), strict=True
    ):
        sizes = [*at_peak(curves).values(), peak(curves), curves.allocated]
        rows[name] = [f"{x:.3f}" for x in sizes]
    print(table("bytes per parameter", [*PARTS, "peak", "reserved"], rows))
    print(f"\npicture: {options.output}")

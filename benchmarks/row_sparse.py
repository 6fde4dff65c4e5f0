"""Times row-sparse steps of tables of up to ten million rows, and compiles them for a billion.

    uv run benchmarks row_sparse
    uv run --with torch benchmarks row_sparse
    uv run --group compilers benchmarks row_sparse --target v5e
    uv run --group compilers benchmarks row_sparse --target h100
    uv run --group compilers benchmarks row_sparse --scale

Without --target and --scale, prints three tables of times on this machine. The model is a table
alone: a step looks vectors up, its loss is their squared distance to given ones, and it updates the
table in place. Ids are drawn as words are: the probability of the k-th most frequent falls as 1/k,
and its row is anywhere in the table. Each step has a batch of its own. All contestants take turns
in one process; the tables have medians:

- the step of every setting: milliseconds, and ratios to the step with `row_sparse(adam)` (lazy), to
  `optax.adam` on the gradient of the whole table, and to torch's SparseAdam, which is lazy too, in
  one thread or in all, whichever is faster;
- the step with many rows and with few. The work is the same, but few rows fit in the caches: a last
  line has the time to read and write as many rows of three arrays;
- the cost of the steps that rows missed, with `exact=True`, if all rows missed the same number.

"Exact" is in its steady state: each row has been idle for as long as its frequency suggests.
"5 bytes" is the 7-byte setting of AdamW, without gradients of the table. XLA for CPU converts a
whole bfloat16 table to write some of its rows, so this setting is timed with small tables only.

With --target, the update is compiled for a device that need not exist here. The columns:

- temporaries: by the compiler's account, as a fraction of the table in float32;
- of all rows: instructions, also inside fusions, whose result has at least as many elements as
  there are rows. Scatters, which write some rows in place, do not count. Instructions that begin
  with a slice-start or copy-start on a TPU move an array into the chip's own memory, if it fits;
- arguments, aliased: MB. Aliased are the outputs that are written over donated arguments, which are
  the table and its state;
- state: MB of table and state, all of which should be aliased.

With --scale, the update is that of a table of a billion rows in 5 bytes, divided by rows over a
TPU's chips; ids and gradients are on every chip, or divided as well. Sizes are those of one chip;
collectives are listed with the size of their results. If 1024 does not divide a chip's rows, XLA
for TPU converts the scales of all rows to another layout and back.
"""

import collections
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from command import only_compile, parse_target, parser
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from scale import collectives
from settings import RATE, settings
from tables import head, line, megabytes, number
from targets import HERE, compile_for, memory, nbytes, placed, tpu
from timing import has_torch, machine, stepping, times
from tqdm import tqdm

import adam_jax

BATCHES = 512  # more than the steps after which an idle row no longer moves
COUNT = 10_000  # steps before those that are timed
IDLE = 1000  # steps missed where they are timed
PRIME = 1_000_003  # times the rank, modulo the number of rows: where a row is
# The type of an instruction's result and its operation; the shape in a type.
INSTRUCTION = re.compile(r"^ +(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z][\w-]*)\(", re.MULTILINE)
SHAPE = re.compile(r"[a-z]+\d+\[([\d,]+)\]")
# Operations that name an array or write into it. Those in a fusion or a loop are listed too.
NOTHING_MADE = (
    *("parameter", "tuple", "get-tuple-element", "bitcast", "fusion", "while", "conditional"),
    *("scatter", "call"),
)
OPTAX, TORCH = "optax.adam, whole table", "torch.optim.SparseAdam"
TIMED = ["lazy", "exact", "lazy, int8 moments", "lazy, 5 bytes"]
COMPILED = ["lazy", "lazy, int8 moments", "lazy, 5 bytes", "exact, adamw"]


class Setting(NamedTuple):
    """A way to train a table."""

    optimizer: optax.GradientTransformation
    exact: bool = False
    dtype: type = jnp.float32

    @property
    def rows(self) -> adam_jax.RowSparse:
        """Returns the functions that look up and update rows."""
        return adam_jax.row_sparse(self.optimizer, exact=self.exact)


class Size(NamedTuple):
    """A table's shape, and the ids of a step."""

    rows: int
    width: int
    ids: int

    def __str__(self) -> str:
        return f"{self.rows:,} x {self.width}, {self.ids:,} ids"

    @property
    def table(self) -> tuple[int, int]:
        """Returns the table's shape."""
        return self.rows, self.width

    @property
    def vectors(self) -> tuple[int, int]:
        """Returns the shape of the vectors that a step looks up."""
        return self.ids, self.width


@functools.cache
def compared() -> dict[str, Setting]:
    """Returns the settings by name."""
    adam, adamw = settings("adam"), settings("adamw")
    return {
        "lazy": Setting(adam["float32"].optimizer),
        "exact": Setting(adam["float32"].optimizer, exact=True),
        "lazy, int8 moments": Setting(adam["int8 moments"].optimizer),
        "lazy, 5 bytes": Setting(adamw["7 bytes"].optimizer, dtype=adamw["7 bytes"].dtype),
        "exact, adamw": Setting(adamw["float32"].optimizer, exact=True),
    }


def loss_of(vectors: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns half of the squared distance between vectors and their targets."""
    return jnp.sum(jnp.square(vectors - targets)) / 2


@functools.cache
def step_of(setting: Setting) -> Any:
    """Returns the training step, jitted; it updates table and state in place."""
    rows = setting.rows

    def step(ids: Any, gradients: Any, table: Any, state: Any) -> tuple[Any, Any, Any]:
        vectors = rows.lookup(ids, table, state)
        loss, gradients = jax.value_and_grad(loss_of)(vectors, gradients)
        return loss, *rows.update(ids, gradients, table, state)

    return jax.jit(step, donate_argnums=(2, 3))


def whole_step() -> Any:
    """Returns the training step that computes the whole table's gradient."""
    optimizer = optax.adam(RATE)

    def step(ids: Any, gradients: Any, table: Any, state: Any) -> tuple[Any, Any, Any]:
        def loss_of_table(table: Any) -> Any:
            return loss_of(jnp.take(table, ids, axis=0, mode="fill"), gradients)

        loss, gradient = jax.value_and_grad(loss_of_table)(table)
        updates, state = optimizer.update(gradient, state)
        return loss, optax.apply_updates(table, updates), state

    return jax.jit(step, donate_argnums=(2, 3))


def drawn(size: Size) -> Iterator[np.ndarray]:
    """Yields the ids of one batch after the other, and repeats them."""
    uniform = np.random.default_rng(0).random((BATCHES, size.ids))
    rank = np.exp(uniform * np.log(size.rows + 1)).astype(np.int64) - 1
    batches = (rank.clip(0, size.rows - 1) * PRIME % size.rows).astype(np.int32)
    while True:
        yield from batches


def idle_steps(size: Size) -> np.ndarray:
    """Draws the number of steps for which each row has been idle, in the steady state."""
    rank = np.arange(size.rows)
    at_least_once = -np.expm1(-size.ids * np.log1p(1 / (rank + 1)) / np.log(size.rows + 1))
    idle = np.random.default_rng(1).geometric(at_least_once) - 1
    found = np.empty(size.rows, np.int32)
    found[rank * PRIME % size.rows] = idle.clip(0, COUNT)
    return found


def started(setting: Setting, size: Size) -> list[Any]:
    """Returns a table and its state after COUNT steps."""
    table = jnp.full(size.table, 0.5, setting.dtype)
    state = setting.rows.init(table)
    state = jax.tree.map(lambda x: x if x.ndim else jnp.full_like(x, COUNT), state)
    if setting.exact:
        state = state._replace(last_step=jnp.asarray(COUNT - idle_steps(size)))
    return [table, state]


def runner(step: Any, size: Size, carry: list[Any], dtype: Any = jnp.float32) -> Callable[[], None]:
    """Returns a function that makes a step; two that take turns can share one carry."""
    batches = drawn(size)
    gradients = jax.random.normal(jax.random.key(0), size.vectors, dtype)
    return stepping(lambda *carry: step(next(batches), gradients, *carry), carry)


def started_runner(setting: Setting, size: Size) -> Callable[[], None]:
    """Returns a function that makes a step of a table of its own."""
    return runner(step_of(setting), size, started(setting, size), setting.dtype)


def torch_runners(size: Size, all_threads: bool = True) -> dict[str, Callable[[], None]]:
    """Returns functions that make torch's step in one thread and in all, of one table."""
    if not has_torch():
        return {}
    import torch

    table = torch.nn.Parameter(torch.full(size.table, 0.5))
    optimizer = torch.optim.SparseAdam([table], lr=RATE)
    batches = drawn(size)
    targets = torch.randn(size.vectors)

    def step_in(threads: int) -> None:
        torch.set_num_threads(threads)
        optimizer.zero_grad()
        ids = torch.from_numpy(next(batches))
        vectors = torch.nn.functional.embedding(ids, table, sparse=True)
        ((vectors - targets).square().sum() / 2).backward()
        optimizer.step()

    threads = sorted({1, torch.get_num_threads()} if all_threads else {1})
    step_in(1)
    for moment in ("exp_avg", "exp_avg_sq"):
        optimizer.state[table][moment].fill_(
            1e-3
        )  # or its memory would be allocated at its first use
    return {f"{TORCH}, threads: {n}": functools.partial(step_in, n) for n in threads}


def touching(size: Size) -> Callable[[], None]:
    """Returns a function that reads and writes rows of three arrays, without an optimizer."""

    @functools.partial(jax.jit, donate_argnums=1)
    def touch(ids: Any, arrays: Any) -> Any:
        ids = jnp.sort(ids)
        return [x.at[ids].add(1.0, indices_are_sorted=True) for x in arrays]

    batches = drawn(size)
    arrays = [jnp.full(size.table, 0.5) for _ in range(3)]
    return stepping(lambda *arrays: touch(next(batches), list(arrays)), arrays)


def runners(size: Size) -> dict[str, Callable[[], None]]:
    """Returns all contestants, with tables of a size."""
    runs = {}
    for name in TIMED:
        setting = compared()[name]
        if setting.dtype == jnp.bfloat16 and math.prod(size.table) > 10**7:
            continue
        carry = started(setting, size)
        runs[name] = runner(step_of(setting), size, carry, setting.dtype)
        if name == "lazy":
            runs[OPTAX] = runner(whole_step(), size, carry)
    return runs | torch_runners(size)


def free_memory() -> float:
    """Returns the bytes of memory that are available."""
    info = Path("/proc/meminfo")
    found = re.search(r"MemAvailable: +(\d+) kB", info.read_text()) if info.exists() else None
    return 1024 * int(found[1]) if found else math.inf


def missing_memory(elements: int, bytes_of_each: int) -> str:
    """Returns a message if there is not enough memory, or nothing."""
    needed, free = 1.2 * elements * bytes_of_each, free_memory()
    return f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free" if needed > free else ""


def turns_of(size: Size, rounds: int) -> int:
    """Returns the number of rounds with tables of a size; fewer if steps take seconds."""
    return rounds if math.prod(size.table) < 10**8 else max(1, rounds // 3)


def print_steps(sizes: list[Size], rounds: int, seconds: float) -> None:
    """Prints the table of all settings."""
    # A table and two moments of lazy and optax.adam together, and this one's gradient and updates;
    # the same of exact; 6 bytes of int8; the same of torch.
    bytes_of_each = 12 + 8 + 12 + 6 + 12 * has_torch()
    print(f"\n{head('step', ['ms', 'time / lazy', 'time / optax.adam', 'time / torch'])}")
    for size in sizes:
        if left_out := missing_memory(math.prod(size.table), bytes_of_each):
            print(line(f"{size}: left out, {left_out}", [""] * 4))
            continue
        taken = times(runners(size), turns_of(size, rounds), seconds, str(size))
        torch = min((time for name, time in taken.items() if name.startswith(TORCH)), default=None)
        for name, time in taken.items():
            peers = taken["lazy"], taken[OPTAX], torch
            ratios = [number(time / peer) if peer else "" for peer in peers]
            print(line(f"{size}: {name}", [number(1e3 * time), *ratios]), flush=True)
    if not has_torch():
        print("\nWithout torch's SparseAdam, since torch cannot be imported.")


def print_growth(sizes: list[Size], rounds: int, seconds: float) -> None:
    """Prints the table of how the time grows with the number of rows."""
    first, *_, last = sizes
    columns = [f"{size.rows:,} x {size.width}, ms" for size in sizes]
    print(f"\n{head(f'step, {first.ids:,} ids', [*columns, 'last / first'])}")
    made: dict[str, Callable[[Size], Callable[[], None]]] = {
        name: functools.partial(started_runner, compared()[name]) for name in TIMED[:3]
    }
    if has_torch():
        made[TORCH] = lambda size: next(iter(torch_runners(size, all_threads=False).values()))
    made["rows only read and written"] = touching
    for name, make in made.items():  # one after the other, which takes less memory
        if left_out := missing_memory(sum(math.prod(size.table) for size in sizes), 12):
            print(line(f"{name}: left out, {left_out}", [""] * (len(sizes) + 1)))
            continue
        taken = times({str(size): make(size) for size in sizes}, rounds, seconds, name)
        ratio = taken[str(last)] / taken[str(first)]
        cells = [number(1e3 * time) for time in taken.values()]
        print(line(name, [*cells, f"{ratio:.2f}"]), flush=True)


def print_replay(size: Size, rounds: int, seconds: float) -> None:
    """Prints the table of the cost of missed steps, if all rows missed them."""
    columns = ["none missed, ms", f"{IDLE} missed, ms", "difference, ms"]
    print(f"\n{head(f'exact, {size.ids:,} x {size.width}', columns)}")
    ids, gradients = jnp.arange(size.ids), jnp.ones(size.vectors)
    for name in ("adam", "adamw"):
        setting = Setting(settings(name)["float32"].optimizer, exact=True)
        table, state = started(setting, size)
        states = [state._replace(last_step=jnp.full(size.rows, COUNT - x)) for x in (0, IDLE)]
        # Nothing is donated: the next call needs it again.
        parts = {
            "lookup": (jax.jit(setting.rows.lookup), ids),
            "update": (jax.jit(setting.rows.update), ids, gradients),
        }
        for part, (function, *args) in parts.items():
            runs = {
                str(missed): waiting(function, *args, table, state)
                for missed, state in zip((0, IDLE), states, strict=True)
            }
            none, all = times(runs, rounds, seconds, f"{name}: {part}").values()
            cells = [number(1e3 * time) for time in (none, all, all - none)]
            print(line(f"{name}: {part}", cells), flush=True)


def waiting(function: Any, *args: Any) -> Callable[[], None]:
    """Returns a function that calls another one and waits for its results."""

    def run() -> None:
        jax.block_until_ready(function(*args))

    return run


def print_times(small: bool, rounds: int) -> None:
    """Prints the three tables of times."""
    if small:
        jax.config.update("jax_disable_most_optimizations", True)  # or most time is the compiler's
        shapes, ids, rounds = [(1000, 32)], [64], 1
        growth, replay = [Size(rows, 32, 64) for rows in (1000, 2000)], Size(64, 32, 64)
    else:
        shapes = [(10**5, 32), (10**5, 128), (10**6, 32), (10**6, 128), (10**7, 32)]
        ids, replay = [512, 4096], Size(4096, 32, 4096)
        growth = [Size(rows, 32, 4096) for rows in (10**5, 10**6, 10**7)]
    seconds = 0.0 if small else 0.1
    print(machine())
    print_steps([Size(*shape, n) for shape in shapes for n in ids], rounds, seconds)
    print_growth(growth, rounds, seconds)
    print_replay(replay, rounds, seconds)


def arguments_of(setting: Setting, size: Size) -> tuple[Any, Any, Any, Any]:
    """Returns the shapes and dtypes of an update's arguments."""
    table = jax.ShapeDtypeStruct(size.table, setting.dtype)
    ids = jax.ShapeDtypeStruct((size.ids,), jnp.int32)
    gradients = jax.ShapeDtypeStruct(size.vectors, setting.dtype)
    return ids, gradients, table, jax.eval_shape(setting.rows.init, table)


def as_large(text: str, elements: int) -> str:
    """Lists a program's operations, except scatters, with that many elements or more."""
    found = collections.Counter(
        operation
        for result, operation in INSTRUCTION.findall(text)
        if operation not in NOTHING_MADE
        and any(
            math.prod(int(n) for n in shape.split(",") if n) >= elements
            for shape in SHAPE.findall(result)
        )
    )
    return ", ".join(f"{n} {operation}" for operation, n in sorted(found.items())) or "none"


def print_compiled(target: str, shape: Size) -> None:
    """Prints the table of updates that are compiled for a device."""
    print(f"The update of a table of {shape}, compiled for {target}.\n")
    columns = ["temporaries / float32 table", "of all rows"]
    print(head("", [*columns, "arguments, MB", "aliased, MB", "state, MB"]))
    for name in tqdm(COMPILED):
        setting = compared()[name]
        args = arguments_of(setting, shape)
        update = jax.jit(setting.rows.update, donate_argnums=(2, 3))
        compiled = compile_for(target, update, *args)
        found = memory(compiled)
        cells = [
            f"{found.temporaries / (4 * math.prod(shape.table)):.4f}",
            as_large(compiled.as_text(), shape.rows),
            *map(megabytes, (found.arguments, found.aliased, nbytes(args[2:]))),
        ]
        print(line(name, cells), flush=True)


def print_scale(sizes: list[Size], topologies: list[str]) -> None:
    """Prints the table of the update of a table that is divided over chips."""
    setting = compared()["lazy, 5 bytes"]
    first, *_ = sizes
    print(f"The update of tables {first.width} wide in 5 bytes, {first.ids:,} ids, on TPU chips.\n")
    columns = ["arguments, MB", "aliased, MB", "temporaries, MB", "of all rows", "collectives"]
    print(head("each chip", columns))
    cases = list(itertools.product(sizes, topologies, ["on every chip", "divided"]))
    for shape, topology, where in tqdm(cases):
        mesh = Mesh(np.array(tpu(topology)).ravel(), ("chips",))
        divided, everywhere = (NamedSharding(mesh, PartitionSpec(x)) for x in ("chips", None))
        table = jax.ShapeDtypeStruct(shape.table, setting.dtype, sharding=divided)
        shardings = adam_jax.state_shardings(setting.optimizer, table)
        state = placed(jax.eval_shape(setting.rows.init, table), shardings)
        ids, gradients, *_ = arguments_of(setting, shape)
        of_ids = divided if where == "divided" else everywhere
        ids, gradients = placed((ids, gradients), (of_ids, of_ids))
        update = jax.jit(
            setting.rows.update, donate_argnums=(2, 3), out_shardings=(divided, shardings)
        )
        compiled = compile_for(topology, update, ids, gradients, table, state)
        found, text = memory(compiled), compiled.as_text()
        cells = [
            *map(megabytes, (found.arguments, found.aliased, found.temporaries)),
            as_large(text, shape.rows // mesh.size),
            collectives(text),
        ]
        name = f"{shape.rows:,} rows, {mesh.size} chips, ids {where}"
        print(line(name, cells), flush=True)


def main() -> None:
    """Prints tables row by row."""
    options = parser("row_sparse", __doc__)
    options.add_argument(
        "--scale", action="store_true", help="compile for a table of a billion rows, on many chips"
    )
    options.add_argument("--rounds", type=int, default=15, help="turns of each (default: 15)")
    options = parse_target(options)
    if options.scale:
        only_compile()
        sizes = [Size(rows, 128, 4096) for rows in (10**9, 2**30)]
        topologies = ["v5p:2x2x4", "v5p:4x4x4"]
        if options.small:
            sizes, topologies = [Size(2**20, 128, 512)], ["v5e:2x2"]
        print_scale(sizes, topologies)
    elif options.target != HERE:
        print_compiled(options.target, Size(10**6, 128, 512 if options.small else 4096))
    else:
        print_times(options.small, options.rounds)

"""Steps of the rows that ids name, of tables of up to ten million rows, and of a billion.

    uv run benchmarks/row_sparse.py
    uv run --with torch benchmarks/row_sparse.py
    uv run --group compilers benchmarks/row_sparse.py --target v5e
    uv run --group compilers benchmarks/row_sparse.py --target h100
    uv run --group compilers benchmarks/row_sparse.py --scale

Without an option, three tables of times on this machine. What is timed are training steps of a
model that consists of a table alone: vectors are looked up, their squared distance to given ones is
the loss, and the table is updated, in place. Ids are drawn as words are, the k-th most frequent
with a probability that falls as 1/k, and their rows are scattered over the table; every step has a
batch of its own. All that are compared take turns in one process, and medians are reported:

- the step of every setting: milliseconds, and ratios to the step with `row_sparse(adam)` (lazy), to
  `optax.adam` on the gradient of the whole table, and to torch's SparseAdam, which is lazy as well,
  in one thread or in all, whichever is faster;
- the step with many rows beside that with few. The work is the same, but the memory of few rows is
  in the caches: a last line has the time to read and write as many rows of three arrays;
- what the steps that rows have missed cost, with `exact=True`, if all rows have missed as many.

"Exact" is in its steady state: rows have been idle as long as rows are that are drawn as often as
they. "5 bytes" is `master_weights(adamw(..., mu_dtype="int8", nu_dtype="int8"), "int8")` of a
bfloat16 table; XLA for CPU converts a whole bfloat16 table in order to write some of its rows, and
so this setting is timed with small tables only.

With --target, the update is compiled for a device that need not be here. The columns:

- temporaries: by the compiler's account, as a fraction of the table in float32;
- of all rows: instructions, inside of fusions as well, whose result has as many elements as there
  are rows, or more. Not counted are scatters, which write some rows of what is there. What begins
  with a slice-start or copy-start on a TPU is brought into the chip's own memory and back, if it
  fits;
- arguments, aliased: MB. Aliased are the outputs that are written over donated arguments, which are
  the table and its state;
- state: MB of table and state: what should be aliased.

With --scale, it is the update of a table of a billion rows in 5 bytes, divided by rows over a TPU's
chips; ids and gradients are on every chip, or are divided as well. Bytes are those of one chip, and
collectives are those in the program, with the size of what comes out of them. Where 1024 does not
divide a chip's rows, XLA for TPU brings the scales of all rows into another layout and back.
"""

import argparse
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
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from scale import collectives, megabytes, placed
from settings import RATE
from speed import has_torch, in_turns, machine
from targets import HERE, compile_for, parse_target, tpu
from tqdm import tqdm

import adam_jax

BATCHES = 512  # more than the steps after which a row has come to rest
COUNT = 10_000  # steps made before what is timed
IDLE = 1000  # steps missed where they are timed
PRIME = 1_000_003  # times the rank, modulo the number of rows: where a row is
# Of a program's instruction, the result's type and the operation; and of a type, the shape.
INSTRUCTION = re.compile(r"^ +(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z][\w-]*)\(", re.MULTILINE)
SHAPE = re.compile(r"[a-z]+\d+\[([\d,]+)\]")
# What names an array, or writes into it. What is in a fusion or a loop is an instruction as well.
NOTHING_MADE = (
    *("parameter", "tuple", "get-tuple-element", "bitcast", "fusion", "while", "conditional"),
    *("scatter", "call"),
)
LAZY, EXACT, INT8, FIVE = "lazy", "exact", "lazy, int8 moments", "lazy, 5 bytes"
OPTAX, TORCH = "optax.adam, whole table", "torch.optim.SparseAdam"
TOUCHED = "rows read and written, no more"


class Setting(NamedTuple):
    """A way to train a table."""

    optimizer: optax.GradientTransformation
    exact: bool = False
    dtype: type = jnp.float32

    @property
    def rows(self) -> adam_jax.RowSparse:
        """The functions of its rows."""
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
        """The table's shape."""
        return self.rows, self.width

    @property
    def vectors(self) -> tuple[int, int]:
        """The shape of what is looked up."""
        return self.ids, self.width


def adamw_int8() -> optax.GradientTransformation:
    """Adam with decoupled decay and int8 moments."""
    return adam_jax.adamw(RATE, mu_dtype="int8", nu_dtype="int8")


def five_bytes() -> Setting:
    """The setting that stores 5 bytes for each element."""
    return Setting(adam_jax.master_weights(adamw_int8(), "int8"), dtype=jnp.bfloat16)


@functools.cache
def settings() -> dict[str, Setting]:
    """What is timed, by name."""
    int8 = adam_jax.adam(RATE, mu_dtype="int8", nu_dtype="int8")
    return {
        LAZY: Setting(adam_jax.adam(RATE)),
        EXACT: Setting(adam_jax.adam(RATE), exact=True),
        INT8: Setting(int8),
        FIVE: five_bytes(),
    }


def compiled_settings() -> dict[str, Setting]:
    """What is compiled for a device, by name."""
    found = settings()
    return {
        "adam": found[LAZY],
        "adam, int8 moments": found[INT8],
        "5 bytes": found[FIVE],
        "adamw, exact": Setting(adam_jax.adamw(RATE), exact=True),
    }


def loss_of(vectors: jax.Array, targets: jax.Array) -> jax.Array:
    """Half of the squared distance to where vectors should be."""
    return jnp.sum(jnp.square(vectors - targets)) / 2


@functools.cache
def step_of(setting: Setting) -> Any:
    """The training step, jitted; table and state are updated in place."""
    rows = setting.rows

    def step(ids: Any, gradients: Any, table: Any, state: Any) -> tuple[Any, Any, Any]:
        vectors = rows.lookup(ids, table, state)
        loss, gradients = jax.value_and_grad(loss_of)(vectors, gradients)
        return loss, *rows.update(ids, gradients, table, state)

    return jax.jit(step, donate_argnums=(2, 3))


def whole_step() -> Any:
    """The training step by way of the whole table's gradient."""
    optimizer = optax.adam(RATE)

    def step(ids: Any, gradients: Any, table: Any, state: Any) -> tuple[Any, Any, Any]:
        def loss_of_table(table: Any) -> Any:
            return loss_of(jnp.take(table, ids, axis=0, mode="fill"), gradients)

        loss, gradient = jax.value_and_grad(loss_of_table)(table)
        updates, state = optimizer.update(gradient, state)
        return loss, optax.apply_updates(table, updates), state

    return jax.jit(step, donate_argnums=(2, 3))


def drawn(size: Size) -> Iterator[np.ndarray]:
    """The ids of batch after batch, over and over."""
    uniform = np.random.default_rng(0).random((BATCHES, size.ids))
    rank = np.exp(uniform * np.log(size.rows + 1)).astype(np.int64) - 1
    batches = (rank.clip(0, size.rows - 1) * PRIME % size.rows).astype(np.int32)
    while True:
        yield from batches


def idle_steps(size: Size) -> np.ndarray:
    """For how many steps each row has not been drawn, once that has become steady."""
    rank = np.arange(size.rows)
    at_least_once = -np.expm1(-size.ids * np.log1p(1 / (rank + 1)) / np.log(size.rows + 1))
    idle = np.random.default_rng(1).geometric(at_least_once) - 1
    found = np.empty(size.rows, np.int32)
    found[rank * PRIME % size.rows] = idle.clip(0, COUNT)
    return found


def started(setting: Setting, size: Size) -> list[Any]:
    """A table and its state after COUNT steps."""
    table = jnp.full(size.table, 0.5, setting.dtype)
    state = setting.rows.init(table)
    state = jax.tree.map(lambda x: x if x.ndim else jnp.full_like(x, COUNT), state)
    if setting.exact:
        state = state._replace(last_step=jnp.asarray(COUNT - idle_steps(size)))
    return [table, state]


def runner(step: Any, size: Size, carry: list[Any], dtype: Any = jnp.float32) -> Callable[[], None]:
    """Makes a step; the carry is a list, so that two that take turns can have one table."""
    batches = drawn(size)
    gradients = jax.random.normal(jax.random.key(0), size.vectors, dtype)

    def run() -> None:
        _, *carry[:] = jax.block_until_ready(step(next(batches), gradients, *carry))

    return run


def started_runner(setting: Setting, size: Size) -> Callable[[], None]:
    """As `runner`, with a table of its own."""
    return runner(step_of(setting), size, started(setting, size), setting.dtype)


def torch_runners(size: Size, all_threads: bool = True) -> dict[str, Callable[[], None]]:
    """As `runner`, with torch in one thread and in as many as it takes, of one table."""
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
        optimizer.state[table][moment].fill_(1e-3)  # or its memory would be there on first use only
    return {f"{TORCH}, threads: {n}": functools.partial(step_in, n) for n in threads}


def touching(size: Size) -> Callable[[], None]:
    """Reads and writes rows of three arrays: what memory costs, without an optimizer."""

    @functools.partial(jax.jit, donate_argnums=1)
    def touch(ids: Any, arrays: Any) -> Any:
        ids = jnp.sort(ids)
        return [x.at[ids].add(1.0, indices_are_sorted=True) for x in arrays]

    arrays = [jnp.full(size.table, 0.5) for _ in range(3)]
    batches = drawn(size)

    def run() -> None:
        arrays[:] = jax.block_until_ready(touch(next(batches), arrays))

    return run


def runners(size: Size) -> dict[str, Callable[[], None]]:
    """Everything that is timed with tables of a size."""
    runs = {}
    for name, setting in settings().items():
        if name == FIVE and math.prod(size.table) > 10**7:
            continue
        carry = started(setting, size)
        runs[name] = runner(step_of(setting), size, carry, setting.dtype)
        if name == LAZY:
            runs[OPTAX] = runner(whole_step(), size, carry)
    return runs | torch_runners(size)


def free_memory() -> float:
    """The bytes that can be had."""
    info = Path("/proc/meminfo")
    found = re.search(r"MemAvailable: +(\d+) kB", info.read_text()) if info.exists() else None
    return 1024 * int(found[1]) if found else math.inf


def missing_memory(elements: int, bytes_of_each: int) -> str:
    """What to print where there is not enough of it, or nothing."""
    needed, free = 1.2 * elements * bytes_of_each, free_memory()
    return f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free" if needed > free else ""


def table_of(header: list[str]) -> None:
    """Prints the head of a table."""
    print(f"\n| {' | '.join(header)} |\n{'|---' * len(header)}|", flush=True)


def row(*cells: Any) -> None:
    """Prints a row of a table."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def turns_of(size: Size, rounds: int) -> int:
    """How many turns everything gets with tables of a size: fewer where steps take seconds."""
    return rounds if math.prod(size.table) < 10**8 else max(1, rounds // 3)


def print_steps(sizes: list[Size], rounds: int, seconds: float, progress: tqdm) -> None:
    """The table of all settings."""
    # A table and two moments of lazy and optax.adam together, and this one's gradient and updates;
    # the same of exact; 6 bytes of int8; the same of torch.
    bytes_of_each = 12 + 8 + 12 + 6 + 12 * has_torch()
    table_of(["step", "ms", "/ lazy", "/ optax.adam", "/ torch"])
    for size in sizes:
        turns = turns_of(size, rounds)
        if left_out := missing_memory(math.prod(size.table), bytes_of_each):
            row(f"{size}: left out, {left_out}", *[""] * 4)
            progress.update(turns)
            continue
        times = in_turns(runners(size), turns, seconds, progress)
        of_torch = [time for name, time in times.items() if name.startswith(TORCH)]
        for name, time in times.items():
            peers = times[LAZY], times[OPTAX], min(of_torch, default=math.inf)
            ratios = ["" if math.isinf(peer) else f"{time / peer:.3g}" for peer in peers]
            row(f"{size}: {name}", f"{1e3 * time:.3g}", *ratios)
    if not has_torch():
        print("\nWithout torch's SparseAdam, since torch cannot be imported.")


def print_growth(sizes: list[Size], rounds: int, seconds: float, progress: tqdm) -> None:
    """The table of how the time grows with the number of rows."""
    first, *_, last = sizes
    columns = [f"{size.rows:,} x {size.width}, ms" for size in sizes]
    table_of([f"step, {first.ids:,} ids", *columns, "last / first"])
    made: dict[str, Callable[[Size], Callable[[], None]]] = {
        name: functools.partial(started_runner, settings()[name]) for name in (LAZY, EXACT, INT8)
    }
    if has_torch():
        made[TORCH] = lambda size: next(iter(torch_runners(size, all_threads=False).values()))
    made[TOUCHED] = touching
    for name, make in made.items():  # one after the other: of memory there is little
        if left_out := missing_memory(sum(math.prod(size.table) for size in sizes), 12):
            row(f"{name}: left out, {left_out}", *[""] * (len(sizes) + 1))
            progress.update(rounds)
            continue
        times = in_turns({str(size): make(size) for size in sizes}, rounds, seconds, progress)
        ratio = times[str(last)] / times[str(first)]
        row(name, *(f"{1e3 * time:.3g}" for time in times.values()), f"{ratio:.2f}")


def print_replay(size: Size, rounds: int, seconds: float, progress: tqdm) -> None:
    """The table of what missed steps cost, of all rows of a table."""
    case = f"exact, {size.ids:,} x {size.width}"
    table_of([case, "none missed, ms", f"{IDLE} missed, ms", "more"])
    ids, gradients = jnp.arange(size.ids), jnp.ones(size.vectors)
    for name in ("adam", "adamw"):
        setting = Setting(getattr(adam_jax, name)(RATE), exact=True)
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
            none, all = in_turns(runs, rounds, seconds, progress).values()
            row(f"{name}: {part}", *(f"{1e3 * time:.3g}" for time in (none, all, all - none)))


def waiting(function: Any, *args: Any) -> Callable[[], None]:
    """Calls a function, and waits for its results."""

    def run() -> None:
        jax.block_until_ready(function(*args))

    return run


def print_times(small: bool, rounds: int) -> None:
    """The three tables of times."""
    if small:
        jax.config.update("jax_disable_most_optimizations", True)  # or most time is the compiler's
        shapes, ids, rounds = [(1000, 32)], [64], 1
        growth, replay = [Size(rows, 32, 64) for rows in (1000, 2000)], Size(64, 32, 64)
    else:
        shapes = [(10**5, 32), (10**5, 128), (10**6, 32), (10**6, 128), (10**7, 32)]
        ids, replay = [512, 4096], Size(4096, 32, 4096)
        growth = [Size(rows, 32, 4096) for rows in (10**5, 10**6, 10**7)]
    sizes = [Size(*shape, n) for shape in shapes for n in ids]
    seconds = 0.0 if small else 0.1
    total = sum(turns_of(size, rounds) for size in sizes) + rounds * (4 + has_torch() + 4)
    progress = tqdm(total=total, unit="round")
    print(machine())
    print_steps(sizes, rounds, seconds, progress)
    print_growth(growth, rounds, seconds, progress)
    print_replay(replay, rounds, seconds, progress)
    progress.close()


def arguments_of(setting: Setting, size: Size) -> tuple[Any, Any, Any, Any]:
    """Shapes and dtypes of what goes into an update."""
    table = jax.ShapeDtypeStruct(size.table, setting.dtype)
    ids = jax.ShapeDtypeStruct((size.ids,), jnp.int32)
    gradients = jax.ShapeDtypeStruct(size.vectors, setting.dtype)
    return ids, gradients, table, jax.eval_shape(setting.rows.init, table)


def as_large(text: str, elements: int) -> str:
    """What a program makes that has so many elements or more, other than by a scatter into it."""
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


def print_compiled(target: str, size: Size) -> None:
    """The table of what the updates take that are compiled for a device."""
    print(f"The update of a table of {size}, compiled for {target}.")
    columns = ["temporaries", "of all rows", "arguments", "aliased", "state"]
    table_of(["", *columns])
    for name, setting in tqdm(compiled_settings().items()):
        args = arguments_of(setting, size)
        update = jax.jit(setting.rows.update, donate_argnums=(2, 3))
        compiled: Any = compile_for(target, update, *args)
        memory = compiled.memory_analysis()
        state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(args[2:]))
        row(
            name,
            f"{memory.temp_size_in_bytes / (4 * math.prod(size.table)):.4f}",
            as_large(compiled.as_text(), size.rows),
            megabytes(memory.argument_size_in_bytes),
            megabytes(memory.alias_size_in_bytes),
            megabytes(state),
        )


def print_scale(sizes: list[Size], topologies: list[str]) -> None:
    """The table of what an update takes of a table that is divided over chips."""
    setting = five_bytes()
    first, *_ = sizes
    print(
        f"The update of tables {first.width} wide in 5 bytes, {first.ids:,} ids, on a TPU; MB of "
        "each chip."
    )
    columns = ["arguments", "aliased", "temporaries", "of all rows", "collectives"]
    table_of(["", *columns])
    cases = list(itertools.product(sizes, topologies, ["on every chip", "divided"]))
    for size, topology, where in tqdm(cases):
        mesh = Mesh(np.array(tpu(topology)).ravel(), ("chips",))
        divided, everywhere = (NamedSharding(mesh, PartitionSpec(x)) for x in ("chips", None))
        table = jax.ShapeDtypeStruct(size.table, setting.dtype, sharding=divided)
        shardings = adam_jax.state_shardings(setting.optimizer, table)
        state = placed(jax.eval_shape(setting.rows.init, table), shardings)
        ids, gradients, *_ = arguments_of(setting, size)
        of_ids = divided if where == "divided" else everywhere
        ids, gradients = placed((ids, gradients), (of_ids, of_ids))
        update = jax.jit(
            setting.rows.update, donate_argnums=(2, 3), out_shardings=(divided, shardings)
        )
        traced = update.trace(ids, gradients, table, state)
        compiled: Any = traced.lower(lowering_platforms=("tpu",)).compile()
        memory = compiled.memory_analysis()
        text = compiled.as_text()
        row(
            f"{size.rows:,} rows, {mesh.size} chips, ids {where}",
            megabytes(memory.argument_size_in_bytes),
            megabytes(memory.alias_size_in_bytes),
            megabytes(memory.temp_size_in_bytes),
            as_large(text, size.rows // mesh.size),
            collectives(text),
        )


def main() -> None:
    """Prints tables in markdown; progress goes to stderr."""
    parser = argparse.ArgumentParser(description="Measures steps of a table's rows.")
    parser.add_argument(
        "--scale", action="store_true", help="compile for a table of a billion rows, on many chips"
    )
    parser.add_argument(
        "--rounds", type=int, default=15, help="turns that each one gets (default: %(default)s)"
    )
    parser.add_argument(
        "--small", action="store_true", help="small tables: shows within seconds that this runs"
    )
    options = parse_target(parser)
    if options.scale:
        jax.config.update("jax_platforms", "cpu")  # or JAX would look for the device itself
        sizes = [Size(rows, 128, 4096) for rows in (10**9, 2**30)]
        topologies = ["v5p:2x2x4", "v5p:4x4x4"]
        if options.small:
            sizes, topologies = [Size(2**20, 128, 512)], ["v5e:2x2"]
        print_scale(sizes, topologies)
    elif options.target != HERE:
        print_compiled(options.target, Size(10**6, 128, 512 if options.small else 4096))
    else:
        print_times(options.small, options.rounds)


if __name__ == "__main__":
    main()

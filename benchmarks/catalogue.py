"""Lists the benchmarks."""

from typing import NamedTuple

from tables import table


class Benchmark(NamedTuple):
    """A line of the list; `takes` is the duration on two CPU cores, unless it names a device."""

    shows: str
    takes: str
    page: str = ""  # the page of docs/ with the results
    needs: str = ""  # options of `uv run`
    options: str = ""  # the benchmark's own


COMPILERS, FLASH, TORCH = "--group compilers", "--with flashoptim-jax", "--with torch"
BENCHMARKS = {
    "speed": Benchmark(
        "times of steps and of compilation on a CPU, compared with optax, torch and FlashOptim",
        *("half an hour", "speed", f"{TORCH} {FLASH}"),
    ),
    "gpu": Benchmark(
        "times, launches, bandwidth and memory of steps on a GPU, in all settings",
        *("8 minutes on an H200", "speed", f'{TORCH} {FLASH} --with "jax[cuda13]"'),
    ),
    "arithmetic": Benchmark(
        "operations of a step per element, or with `--sass` an H100's machine instructions",
        *("seconds; `--sass` minutes", "speed", COMPILERS, "--sass"),
    ),
    "bytes": Benchmark(
        "bytes per parameter of a step of GPT-2 in all settings, by the compiler's account",
        *("minutes", "formats", f"{COMPILERS} {FLASH}", "--target h100"),
    ),
    "memory": Benchmark(
        "peak memory of whole training steps of GPT-2 and Llama 3.1, and whether they fit",
        *("hours; one model minutes", "memory", f"{COMPILERS} {FLASH}"),
    ),
    "step_memory": Benchmark(
        "a picture of the memory in use over a step, plain and with gradient release",
        *("minutes", "gradient_release", COMPILERS),
    ),
    "release": Benchmark(
        "memory, matrix products and times of gradient release, compared with the plain step",
        *("minutes", "gradient_release"),
    ),
    "accumulation": Benchmark(
        "memory of gradient accumulation in several ways",
        *("minutes", "gradient_release", COMPILERS, "--target v5e"),
    ),
    "row_sparse": Benchmark(
        "times of row-sparse steps, compared with optax and torch; with `--target` their memory",
        *("a quarter of an hour", "row_sparse", TORCH),
    ),
    "scale": Benchmark(
        "memory and collectives of a step of Llama 3.1 405B on a pod of 4096 TPU chips",
        *("half an hour", "devices", COMPILERS),
    ),
    "quality": Benchmark(
        "what a GPT and a network for MNIST learn in each setting, over three seeds",
        *("an hour", "quality", FLASH),
    ),
    "quality_at_size": Benchmark(
        "what a GPT of ten million parameters learns in each setting",
        *("an hour or two", "quality"),
    ),
    "stress": Benchmark(
        "errors of formats for moments on gradients that are hard on them",
        *("minutes", "quality"),
    ),
    "imports": Benchmark("times of `import adam_jax`, compared with `import optax`", "minutes"),
}


def command(name: str) -> str:
    """Returns the command that prints the published results."""
    found = BENCHMARKS[name]
    return " ".join(filter(None, ["uv run", found.needs, "benchmarks", name, found.options]))


def page() -> str:
    """Returns the table of docs/benchmarks.md."""
    rows = {
        f"`{command(name)}`": [
            x.shows,
            x.takes,
            f"[{x.page.replace('_', ' ')}]({x.page}.md)" if x.page else "",
        ]
        for name, x in BENCHMARKS.items()
    }
    return table("command", ["shows", "takes", "results"], rows, align="---")

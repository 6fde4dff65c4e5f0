"""Compiles for a GPU or a TPU on a machine that has neither, and counts a program's memory.

The compilers are packages that need no device: `uv run --group compilers ...` installs them.
"""

import gc
import math
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

HERE = "here"
PLATFORMS = {"h100": "cuda", "v5e": "tpu", "v5p": "tpu"}
TARGETS = [HERE, *PLATFORMS]
SMALLEST = {"v5e": "2x2", "v5p": "2x2x1"}  # the smallest topologies that exist


class Memory(NamedTuple):
    """The compiler's account of a program, in bytes on each device."""

    arguments: float
    outputs: float
    aliased: float  # outputs that are written over donated arguments
    temporaries: float

    @property
    def peak(self) -> float:
        """The most that is in use at one time."""
        return self.arguments + self.outputs - self.aliased + self.temporaries

    def per(self, count: int) -> "Memory":
        """Returns bytes per parameter."""
        return Memory(*(size / count for size in self))


class Stages(NamedTuple):
    """The seconds that each stage of compiling a program takes."""

    trace: float
    lower: float
    compile: float


def compile_for(target: str, function: Any, *args: Any, **options: Any) -> Any:
    """Compiles a jitted function for arguments given by shape and dtype.

    Arguments without a sharding go on one device. Options are the compiler's, such as xla_dump_to.
    """
    return in_stages(target, function, *args, **options)[0]


def compile_cold(target: str, function: Any, *args: Any) -> tuple[Any, Stages]:
    """Compiles with nothing cached, and returns the time of each stage as well."""
    jax.clear_caches()
    gc.collect()
    gc.freeze()  # or the collector would walk all of torch in the middle of a measurement
    return in_stages(target, function, *args)


def in_stages(target: str, function: Any, *args: Any, **options: Any) -> tuple[Any, Stages]:
    """Compiles, and returns the time of each stage as well."""
    lowering = {}
    if target != HERE:
        args = on_one_device(target, args)
        lowering["lowering_platforms"] = (PLATFORMS[target.partition(":")[0]],)
    at = [time.perf_counter()]
    traced = function.trace(*args)
    at.append(time.perf_counter())
    lowered = traced.lower(**lowering)
    at.append(time.perf_counter())
    compiled = lowered.compile(options)
    at.append(time.perf_counter())
    return compiled, Stages(*np.diff(at).tolist())


def on_one_device(target: str, tree: Any) -> Any:
    """Returns shapes and dtypes with a sharding; those without one get the target's first chip."""
    given = lambda x: isinstance(x, jax.ShapeDtypeStruct) and x.sharding  # noqa: E731
    if all(map(given, jax.tree.leaves(tree))):
        return tree
    one = NamedSharding(Mesh(np.array(devices(target)[:1]), ("x",)), PartitionSpec())
    return jax.tree.map(
        lambda x: x if given(x) else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), tree
    )


def placed(tree: Any, shardings: Any) -> Any:
    """Returns the shapes of a tree, each with its sharding."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings,
    )


def memory(compiled: Any) -> Memory:
    """Returns the compiler's account of a program."""
    found = compiled.memory_analysis()
    assert found is not None, "this backend does not count memory"
    return Memory(
        found.argument_size_in_bytes,
        found.output_size_in_bytes,
        found.alias_size_in_bytes,
        found.temp_size_in_bytes,
    )


def refusal(error: Exception) -> str:
    """Returns the first line of an error about too little memory; raises any other error."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    return str(error).splitlines()[0]


def count(tree: Any) -> int:
    """Returns the number of elements of a tree."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
    """Returns the bytes of a tree's arrays; of sharded ones, of one device's part."""
    return sum(
        leaf.dtype.itemsize
        * math.prod(leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape)
        for leaf in jax.tree.leaves(tree)
    )


def devices(target: str) -> list[Any]:
    """Returns the devices that the compiler is told about; "h100:8" are eight in one machine."""
    chip, _, topology = target.partition(":")
    if PLATFORMS[chip] == "tpu":
        return tpu(target if topology else f"{chip}:{SMALLEST[chip]}")
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        target_config=Path(__file__).with_name("h100.textproto").read_text(),
        topology=f"1x1x{topology or 1}",
    ).devices


def tpu(topology: str) -> list[Any]:
    """Returns the chips of a TPU topology, such as v5p:16x16x16."""
    # What the TPU's runtime would ask its machine for.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_WORKER_ID", "0")
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices

"""Compiling for a GPU or a TPU on a machine that has neither.

The compilers come with packages of their own, which need no device:

    uv run --with jax-cuda12-plugin --with jax-cuda12-pjrt --with nvidia-cuda-nvcc-cu12 ...
    uv run --with "jax[tpu]" ...
"""

import argparse
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

HERE = "here"
PLATFORMS = {"h100": "cuda", "v5e": "tpu", "v5p": "tpu"}
TARGETS = [HERE, *PLATFORMS]
SMALLEST = {"v5e": "2x2", "v5p": "2x2x1"}  # topologies: no smaller ones can be asked for


def parse_target(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, with a --target; before anything else, which might look for devices."""
    parser.add_argument(
        "--target", choices=TARGETS, default=HERE, help="what to compile for (default: here)"
    )
    options = parser.parse_args()
    if options.target != HERE:
        jax.config.update("jax_platforms", "cpu")  # or JAX would look for the device itself
    return options


def compile_for(target: str, function: Any, *args: Any, **options: Any) -> Any:
    """The compiled program of a jitted function, for arguments given by shape and dtype.

    Options are the compiler's, such as xla_dump_to.
    """
    if target == HERE:
        return function.lower(*args).compile(options)
    sharding = NamedSharding(Mesh(np.array(devices(target)[:1]), ("x",)), PartitionSpec())
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    return function.trace(*args).lower(lowering_platforms=(PLATFORMS[target],)).compile(options)


def devices(target: str) -> list[Any]:
    """The devices that the compiler is told about: "h100:8" are eight in one machine."""
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
    """The chips of a TPU topology, such as v5p:16x16x16."""
    # What the TPU's runtime would ask its machine for.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_WORKER_ID", "0")
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices

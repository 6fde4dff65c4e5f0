"""What a training run does, whatever its numbers are stored in."""

import argparse
import math
from typing import Any, NamedTuple

from model import HEAD_WIDTH
from precision import VARIANTS


class Experiment(NamedTuple):
    """The sizes of the model, the batches and the steps: the same for all settings."""

    steps: int = 400
    layers: int = 3
    width: int = 128
    context: int = 128
    batch_size: int = 16
    learning_rate: float = 4e-3
    variant: str = "adamw"
    seed: int = 0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds an option for each field of an `Experiment`."""

    def add(name: str, metavar: str, kind: Any, about: str, **more: Any) -> None:
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            default=Experiment._field_defaults[name],
            metavar=metavar,
            help=f"{about} (default: %(default)s)",
            **more,
        )

    add("steps", "N", positive, "batches to train on")
    add("layers", "N", positive, "transformer blocks")
    add("width", "N", heads, f"size of each vector; heads have {HEAD_WIDTH}")
    add("context", "N", positive, "bytes that the model sees")
    add("batch_size", "N", positive, "pieces of text per step")
    add("learning_rate", "RATE", rate, "peak rate, after warmup")
    add("variant", "NAME", str, f"optimizer: {', '.join(VARIANTS)}", choices=VARIANTS)
    add("seed", "N", seed, "of weights and batches")


def experiment_of(options: argparse.Namespace) -> Experiment:
    """Returns the experiment that the command line asks for."""
    return Experiment(**{name: getattr(options, name) for name in Experiment._fields})


def positive(text: str) -> int:
    """Parses an integer of at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def heads(text: str) -> int:
    """Parses the width of a whole number of attention heads."""
    if (value := int(text)) < 1 or value % HEAD_WIDTH:
        raise argparse.ArgumentTypeError(f"must be a multiple of {HEAD_WIDTH}, got {value}")
    return value


def rate(text: str) -> float:
    """Parses a positive, finite number."""
    if not 0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive, got {value}")
    return value


def seed(text: str) -> int:
    """Parses an unsigned integer of 32 bits."""
    if not 0 <= (value := int(text)) < 2**32:
        raise argparse.ArgumentTypeError(f"must be from 0 to 2^32 - 1, got {value}")
    return value

"""Reads the options of a benchmark."""

import argparse

import jax
from targets import HERE, TARGETS


def parser(name: str, help: str | None) -> argparse.ArgumentParser:
    """Returns a parser whose help is the benchmark's docstring, with the option --small."""
    found = argparse.ArgumentParser(
        prog=f"benchmarks {name}",
        description=help,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument(
        "--small",
        action="store_true",
        help="shows in seconds or a few minutes that everything runs; the numbers mean nothing",
    )
    return found


def parse_target(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parses the command line with a --target; must run before anything looks for devices."""
    parser.add_argument(
        "--target", choices=TARGETS, default=HERE, help="what to compile for (default: here)"
    )
    options = parser.parse_args()
    if options.target != HERE:
        only_compile()
    return options


def only_compile() -> None:
    """Makes JAX use the CPU; otherwise it would look for the device that it compiles for."""
    jax.config.update("jax_platforms", "cpu")

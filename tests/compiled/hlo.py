"""Parses the text of a program that XLA compiled, and runs it in NumPy.

This runs programs that were compiled for an absent device. It knows the operations that an
optimizer's step consists of, and no others.
"""

import dataclasses
import functools
import math
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

DTYPES = {
    "pred": np.bool_,
    "bf16": jnp.bfloat16,
    "f16": np.float16,
    **{f"f{bits}": np.dtype(f"float{bits}") for bits in (32, 64)},
    **{f"s{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"u{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
}
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^{}]*\})?")


@dataclasses.dataclass(frozen=True)
class Array:
    """A type: dtype, shape and layout, the last in the compiler's notation."""

    dtype: str
    shape: tuple[int, ...]
    layout: str

    @property
    def size(self):
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    arrays: tuple[Array, ...]  # of its result; several for a tuple
    operation: str
    operands: tuple[str, ...]  # names
    literal: str  # the text between the parentheses
    attributes: str  # the text after them

    def attribute(self, name, pattern=r"%?([\w.-]+)"):
        found = re.search(rf"\b{name}={pattern}", self.attributes)
        return found and found[1]

    def numbers(self, name):
        """Returns the numbers of an attribute such as dimensions={0,1}."""
        found = self.attribute(name, r"\{([\d,]*)\}")
        return tuple(map(int, found.split(","))) if found else ()


@dataclasses.dataclass
class Computation:
    instructions: dict[str, Instruction]
    root: str

    @property
    def parameters(self):
        found = [x for x in self.instructions.values() if x.operation == "parameter"]
        return sorted(found, key=lambda x: int(x.literal))


class Program:
    """A compiled program."""

    def __init__(self, text):
        self.text = text
        self.computations = {}
        self.entry = None
        current = Computation({}, "")
        for line in text.splitlines():
            if found := COMPUTATION.match(line):
                current = Computation({}, "")
                self.computations[found[2]] = current
                if found[1]:
                    self.entry = current
            elif found := INSTRUCTION.match(line):
                root, name, kind, operation, rest = found.groups()
                inside, attributes = _closed(rest)
                current.instructions[name] = Instruction(
                    name,
                    tuple(_arrays(kind)),
                    operation,
                    tuple(re.findall(r"%([\w.-]+)", inside)),
                    inside,
                    attributes,
                )
                if root:
                    current.root = name
        assert self.entry is not None, "no program in this text"

    @functools.cached_property
    def aliased(self):
        """The number of each result, and of the parameter that it overwrites."""
        header = self.text.partition("\n")[0]
        pairs = re.findall(r"\{(\d*)\}: \((\d+), \{\}, (?:may|must)-alias\)", header)
        return {int(result or 0): int(parameter) for result, parameter in pairs}

    def operations(self):
        """Returns the operations of all computations."""
        return {x.operation for c in self.computations.values() for x in c.instructions.values()}

    def run(self, *arguments):
        """Returns a list of the results for NumPy arrays as arguments."""
        with np.errstate(all="ignore"):
            results = self._run(self.entry, arguments)
        return list(results) if isinstance(results, tuple) else [results]

    def _run(self, computation, arguments):
        values = {}
        for x in computation.instructions.values():  # already in an order that can be run
            if x.operation == "parameter":
                values[x.name] = arguments[int(x.literal)]
            else:
                value = self._value(x, [values[name] for name in x.operands])
                values[x.name] = value if isinstance(value, tuple) else self._as_declared(x, value)
        return values[computation.root]

    @staticmethod
    def _as_declared(x, value):
        (declared,) = x.arrays
        value = np.asarray(value)
        assert (value.shape, value.dtype) == (declared.shape, DTYPES[declared.dtype]), x
        return value

    def _value(self, x, operands):
        if x.operation in ELEMENTWISE:
            return ELEMENTWISE[x.operation](*operands)
        if x.operation in ("fusion", "call"):
            called = x.attribute("calls") or x.attribute("to_apply")
            return self._run(self.computations[called], operands)
        if x.operation == "tuple":
            return tuple(operands)
        first: Any = operands[0] if operands else None
        if x.operation == "get-tuple-element":
            return first[int(x.attribute("index"))]
        if x.operation == "reduce":
            return self._reduced(x, *operands)
        if x.operation == "copy-start":
            return first, first
        if x.operation == "copy-done":
            return first[0]
        (declared,) = x.arrays
        dtype, shape = DTYPES[declared.dtype], declared.shape
        match x.operation:
            case "constant":
                assert declared.size == 1, x
                literal = x.literal.strip("{ }")
                if dtype == np.bool_:
                    return np.full(shape, literal == "true")
                # float64 would round a large integer.
                number = int(literal) if re.fullmatch(r"-?\d+", literal) else float(literal)
                return np.full(shape, number).astype(dtype)
            case "iota":
                axis = int(x.attribute("iota_dimension"))
                along = [-1 if i == axis else 1 for i in range(len(shape))]
                iota = np.arange(shape[axis]).astype(dtype).reshape(along)
                return np.broadcast_to(iota, shape)
            case "broadcast":
                kept = dict(zip(x.numbers("dimensions"), first.shape, strict=True))
                return np.broadcast_to(
                    first.reshape([kept.get(i, 1) for i in range(len(shape))]), shape
                )
            case "convert":
                return first.astype(dtype)
            case "bitcast-convert":
                return first.view(dtype)
            case "bitcast" | "reshape":  # also between layouts, which NumPy does not have
                return first.view(dtype).reshape(shape)
            case "copy":
                return first
            case "concatenate":
                return np.concatenate(operands, axis=int(x.numbers("dimensions")[0]))
            case "slice":
                bounds = re.findall(r"\[(\d+):(\d+)\]", x.attribute("slice", r"\{(.*?)\}"))
                return first[tuple(slice(int(start), int(end)) for start, end in bounds)]
            case "reduce-precision":
                assert (x.attribute("exponent_bits"), x.attribute("mantissa_bits")) == ("8", "7")
                return first.astype(jnp.bfloat16).astype(dtype)
            case "compare":
                return COMPARISONS[x.attribute("direction")](*operands)
        raise NotImplementedError(x)

    def _reduced(self, x, operand, initial):
        reducer = self.computations[x.attribute("to_apply")]
        operation = reducer.instructions[reducer.root].operation
        function = {"maximum": np.max, "add": np.sum, "and": np.all}[operation]
        reduced = function(operand, axis=x.numbers("dimensions"))
        return ELEMENTWISE[operation](reduced, initial)


def _shift_right(x, by):
    return x >> by.astype(x.dtype)


def _logical_shift_right(x, by):
    unsigned = np.dtype(f"u{x.dtype.itemsize}")
    return (x.view(unsigned) >> by.astype(unsigned)).view(x.dtype)


def _truncated(x, y):
    """Divides as XLA does: integers round towards zero."""
    if not jnp.issubdtype(x.dtype, jnp.integer):
        return x / y
    assert jnp.issubdtype(x.dtype, jnp.unsignedinteger)
    return x // y


ELEMENTWISE = {
    "abs": np.abs,
    "add": np.add,
    "and": np.bitwise_and,
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
    "divide": _truncated,
    "exponential": np.exp,
    "exponential-minus-one": np.expm1,
    "floor": np.floor,
    "is-finite": np.isfinite,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "multiply": np.multiply,
    "negate": np.negative,
    "not": np.invert,
    "or": np.bitwise_or,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "select": np.where,
    "shift-left": lambda x, by: x << by.astype(x.dtype),
    "shift-right-arithmetic": _shift_right,
    "shift-right-logical": _logical_shift_right,
    "sign": np.sign,
    "sqrt": np.sqrt,
    "subtract": np.subtract,
    "tanh": np.tanh,
    "cosine": np.cos,
    "xor": np.bitwise_xor,
}
COMPARISONS = {
    "EQ": np.equal,
    "NE": np.not_equal,
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
}


def _arrays(kind):
    for dtype, dimensions, layout in ARRAY.findall(kind):
        shape = tuple(int(size) for size in dimensions.split(",") if size)
        yield Array(dtype, shape, layout)


def _closed(text):
    """Splits the text at the parenthesis that closes one opened before it."""
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[:i], text[i + 1 :]
    raise ValueError(f"a parenthesis is not closed: {text}")

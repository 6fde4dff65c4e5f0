"""Counts the machine instructions that an H100 executes, without an H100.

XLA's compiler for CUDA needs no GPU. It dumps each kernel in PTX, NVIDIA's assembly language, and
the list of launches with their numbers of threads. NVIDIA's ptxas turns PTX into machine code, and
nvdisasm prints that code, called SASS.

Each thread of a launch counts each instruction once. That is too many where threads branch forward
or end early; among the kernels that take any time only the row maxima do so, before their last
store.

The body of a loop counts as often as it runs. ptxas unrolls loops, so only the SASS shows how
often: a counter starts at a constant, changes by a constant and ends the loop when it passes a
constant. Any other loop is an error. So far no kernel that takes any time has a loop: each thread
of a row maximum reads its share of a row in straight-line code.
"""

import collections
import importlib.util
import math
import operator
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from targets import compile_for

KINDS = {
    "float": "FADD FFMA FMUL HADD2 HFMA2 HMUL2",
    "integer": "BREV FLO IABS IADD3 IMAD LEA LOP3 POPC PRMT SGXT SHF VIADD",
    "comparison": "FMNMX FSEL FSET FSETP HMNMX2 HSET2 HSETP2 IMNMX ISETP PLOP3 SEL VIADDMNMX "
    "VIMNMX VIMNMX3",
    "conversion": "F2F F2FP F2I F2IP FRND I2F I2FP I2IP",
    "special": "MUFU",
    "memory": "LDC LDG LDL LDS LDSM STG STL STS",
}
KIND = {opcode: kind for kind, opcodes in KINDS.items() for opcode in opcodes.split()}

ENTRY = re.compile(r"\.entry (\w+)")
LAUNCH = re.compile(r"(\w+) grid: \[(\d+), (\d+), (\d+)\] threads: \[(\d+), (\d+), (\d+)\]")
LABEL = re.compile(r"(\.L\w+):")
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+([@A-Z][^;]*?)\s*;")  # after its address
OPCODE = re.compile(r"(?:@\S+ )?(\w+)")
BRANCH = re.compile(r"(?:@\S+ )?BRA\b.*`\((\S+)\)")
# A loop's last instruction with the test before it; a change of a counter; its initial value.
NUMBER = r"(-?0x[0-9a-f]+|RZ)"
TEST = re.compile(
    rf"^ISETP\.(\w\w)(\.U32)?\.AND (P\d), PT, (R\d+), {NUMBER}, PT$(?s:.*)^@(!?)\3 BRA \S+\Z",
    re.MULTILINE,
)
STEP = re.compile(rf"(?:VIADD|IADD3) (R\d+), \1, {NUMBER}(?:, RZ)?")
INITIAL = re.compile(rf"\S*MOV\S* R\d+, (?:RZ, RZ, )?{NUMBER}")
COMPARISONS = {
    name.upper(): getattr(operator, name) for name in ("eq", "ge", "gt", "le", "lt", "ne")
}


def by_kind(opcodes: collections.Counter[str]) -> collections.Counter[str]:
    """Adds up the opcodes of each kind."""
    kinds: collections.Counter[str] = collections.Counter()
    for opcode, number in opcodes.items():
        # A leading U marks an instruction that a warp executes once, for all of its threads.
        kinds[KIND.get(opcode) or KIND.get(opcode.removeprefix("U"), "other")] += number
    return kinds


def count(function: Any, *args: Any) -> collections.Counter[str]:
    """Counts what all threads of a jitted function's kernels execute, by opcode."""
    ptxas, nvdisasm = program("ptxas"), program("nvdisasm")
    kernels: dict[str, collections.Counter[str]] = {}
    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        compile_for("h100", function, *args, xla_dump_to=folder)
        for ptx in Path(folder).glob("*.ptx"):
            if entry := ENTRY.search(ptx.read_text()):  # one file has constants only
                cubin = ptx.with_suffix(".cubin")
                subprocess.run([ptxas, "-arch=sm_90a", ptx, "-o", cubin], check=True)
                disassemble = [nvdisasm, "-c", cubin]
                # It warns that it knows a newer form of these files.
                listing = subprocess.run(disassemble, check=True, capture_output=True, text=True)
                kernels[entry[1]] = executed(listing.stdout)
        (file,) = Path(folder).glob("*.thunk_sequence.txt")
        launches = file.read_text()
        if found := re.search("kWhile|kConditional", launches):
            raise ValueError(f"nothing tells how often the launches in a {found[0]} run")
        for name, *sizes in LAUNCH.findall(launches):
            threads = math.prod(map(int, sizes))
            for opcode, number in kernels[name].items():
                counts[opcode] += threads * number
    return counts


def program(name: str) -> str:
    """Finds one of NVIDIA's programs in its Python package."""
    nvidia = importlib.util.find_spec("nvidia")
    packages = (nvidia and nvidia.submodule_search_locations) or []
    folders = [str(folder) for package in packages for folder in Path(package).glob("*/bin")]
    path = shutil.which(name, path=os.pathsep.join(folders))
    if path is None:
        command = "uv run --group compilers benchmarks arithmetic --sass"
        sys.exit(f"NVIDIA's {name} is not installed; to run with it: {command}")
    return path


def executed(sass: str) -> collections.Counter[str]:
    """Counts what one thread of a kernel executes, by opcode without its modifiers."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(code)
        elif instruction := INSTRUCTION.match(line):
            code.append(instruction[1].replace(".reuse", ""))
    times = [1] * len(code)
    for end, instruction in enumerate(code):
        if branch := BRANCH.match(instruction):
            start = labels[branch[1]]
            if start == end:  # to itself: behind the kernel's end, for padding as NOPs are
                times[end] = 0
            elif start < end:
                repeats = trips(code, start, end)
                times[start : end + 1] = [repeats * number for number in times[start : end + 1]]
    counts: collections.Counter[str] = collections.Counter()
    for instruction, number in zip(code, times, strict=True):
        if found := OPCODE.match(instruction):
            counts[found[1]] += number
    del counts["NOP"]
    return +counts


def trips(code: list[str], start: int, end: int) -> int:
    """Reads how often a loop runs from the instructions on its counter.

    Twice, for instance, if the counter R6 is -0x10 before the loop, which ends with

        VIADD R6, R6, 0x40
        ISETP.GE.U32.AND P0, PT, R6, 0x70, PT
        @!P0 BRA `(.L_x_0)
    """
    before, loop = "\n".join(code[:start]), "\n".join(code[start : end + 1])
    if test := TEST.search(loop):
        comparison, unsigned, _, counter, bound, negated = test.groups()
        writes = re.compile(rf"^(?:@\S+ )?\S+ {counter}, .*", re.MULTILINE)
        changes = list(writes.finditer(loop))
        initial = INITIAL.fullmatch((writes.findall(before) or [""])[-1])
        step = STEP.fullmatch(changes[0][0]) if len(changes) == 1 else None
        if initial and step:
            late = changes[0].start() > test.start()  # the counter changes after the test
            for repeats in range(1, 2**20):
                tested = constant(initial[1]) + constant(step[2]) * (repeats - late)
                sides = [side % 2**32 if unsigned else side for side in (tested, constant(bound))]
                if COMPARISONS[comparison](*sides) == bool(negated):
                    return repeats
    raise ValueError(f"nothing tells how often this loop runs:\n{loop}")


def constant(operand: str) -> int:
    """Returns the value of a constant; RZ is the register of zero."""
    return 0 if operand == "RZ" else int(operand, 16)

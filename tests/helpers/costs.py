"""What a program of a lowered kernel does, read from its HIVM module: bytes moved, cube and vector work, single elements.

HIVM is the code that Ascend's compiler hands to its assembler, so these are counts of what is written there, not of what a chip
did. A loop whose bounds are numbers is counted out; a loop over an argument (K, keys, columns) is one step, and its counts stand
apart. A branch is counted as taken.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter

BYTES = {
    "i1": 0.125,
    "i8": 1,
    "ui8": 1,
    "i16": 2,
    "bf16": 2,
    "f16": 2,
    "i32": 4,
    "ui32": 4,
    "f32": 4,
    "i64": 8,
    "f64": 8,
}
_MEMREF = re.compile(r"memref<((?:\d+x)*)(\w+)[,>]")
_CALL = re.compile(r"(?:func\.)?call @(\w+)\(([^)]*)\) : \((.*)\) -> ")
_LOOP = re.compile(r"scf\.for %\S+ = (%\S+) to (%\S+) step (%\S+)")
_FROM_MEMORY = ("nd2nz", "load_gm", "set_l1_from")
_TO_MEMORY = ("store_ubuf", "fixpipe")


@dataclasses.dataclass
class Work:
    """Of one program: outside of the loop over an argument (`once`), and for each of its steps (`step`)."""

    once: Counter[str] = dataclasses.field(default_factory=Counter)
    step: Counter[str] = dataclasses.field(default_factory=Counter)

    def of(self, steps: int) -> Counter[str]:
        return Counter({k: self.once[k] + steps * self.step[k] for k in {*self.once, *self.step}})


def cores(hivm: str) -> dict[str, int]:
    """Cube and vector cores of the chip, as the module states them."""
    found = dict(re.findall(r'"(CUBE|VECTOR)_CORE_COUNT", (\d+)', hivm))
    return {"cube": int(found["CUBE"]), "vector": int(found["VECTOR"])}


def work(hivm: str) -> Work:
    """Keys: `read` and `written` (bytes from and to the chip's memory), `macs` (the cube's multiply-adds), `vector` (repeats of 256
    bytes), `single` (elements that the scalar unit loads or stores, one by one)."""
    total = Work()
    for function in re.split(r"\n  func\.func ", hivm)[1:]:
        if not function.startswith("private"):
            _function(function, total)
    return total


def _function(text: str, total: Work) -> None:
    numbers: dict[str, int] = {}
    defined: dict[str, str] = {}
    loops: list[tuple[int, int | None]] = []  # (indentation, trips)
    for line in text.splitlines():
        here = len(line) - len(line.lstrip())
        while loops and here <= loops[-1][0] and line.strip().startswith("}"):
            loops.pop()
        constant = re.match(r"\s*(%\S+) = arith\.constant (-?\d+) : (?:index|i32|i64)", line)
        if constant:
            numbers[constant[1]] = int(constant[2])
        definition = re.match(r"\s*(%[\w-]+)(?::\d+)? = (.*)", line)
        if definition:
            defined[definition[1]] = definition[2]
        loop = _LOOP.search(line)
        if loop:
            carried = re.search(r"iter_args\((.*?)\) -> \((.*)\)", line)
            if carried:
                for pair, kind in zip(carried[1].split(", "), _types(carried[2]), strict=False):
                    defined[pair.split(" = ")[0]] = f"carried : {kind}"
            low, high, by = (numbers.get(x) for x in loop.groups())
            trips = None if low is None or high is None or not by else -(-(high - low) // by)
            loops.append((here, trips))
            continue
        into = total.step if any(trips is None for _, trips in loops) else total.once
        times = math.prod(trips for _, trips in loops if trips is not None)
        for name, amount in _line(line, defined).items():
            into[name] += times * amount


def _types(text: str) -> list[str]:
    return re.findall(r"memref<[^>]*(?:<[^>]*>[^>]*)*>|[\w!.<>]+", text)


def _line(line: str, defined: dict[str, str]) -> dict[str, float]:
    call = _CALL.search(line)
    if call is None:
        single = re.search(r"memref\.(load|store) ", line) is not None and "address_space<ub>" in line
        return {"single": 1} if single else {}
    name, operands = call[1], [x.strip() for x in call[2].split(",")]
    sizes = [_size(x, defined) for x in operands if x.startswith("%")]
    known = [s for s in sizes if s is not None]
    if not known:
        return {}
    if name.startswith(_FROM_MEMORY):
        return {"read": known[-1][1]}
    if name.startswith(_TO_MEMORY):
        return {"written": known[0][0] * BYTES[_stored(name, known[0][2])]}
    if name.startswith("mma_tile"):
        a, b, c = (s[0] for s in (known[0], known[1], known[-1]))
        return {"macs": math.sqrt(a * b * c), "macs32": math.sqrt(a * b * c) if known[0][2] == "f32" else 0}
    if name.startswith(("v", "reduce", "enablevc", "broadcast", "copy_ubuf")):
        return {"vector": math.ceil(max(s[1] for s in known) / 256)}
    return {}


def _stored(name: str, dtype: str) -> str:
    """What fixpipe writes: it rounds on the way."""
    found = re.search(r"_to_(bfloat16_t|half|float)", name)
    return {"bfloat16_t": "bf16", "half": "f16", "float": "f32"}[found[1]] if found else dtype


def _size(name: str, defined: dict[str, str], depth: int = 0) -> tuple[int, float, str] | None:
    """(elements, bytes, dtype) of the whole buffer on the chip that a name is or is cut out of; None for numbers and memory."""
    line = defined.get(name)
    if line is None or depth > 12:
        return None
    if "memref<" not in line:
        return None
    static = [
        (math.prod(int(n) for n in shape.split("x") if n), dtype)
        for shape, dtype in _MEMREF.findall(line)
        if shape and dtype in BYTES
    ]
    if "address_space<gm>" in line:
        return None
    if static:
        elements, dtype = max(static)
        return elements, elements * BYTES[dtype], dtype
    return next((found for x in re.findall(r"%[\w-]+", line) if (found := _size(x, defined, depth + 1))), None)

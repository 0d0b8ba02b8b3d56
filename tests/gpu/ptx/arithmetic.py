"""Arithmetic, logic, comparisons, conversions and moves, on all lanes at once."""

from collections.abc import Callable, Sequence

import numpy as np

from ptx import bits
from ptx.machine import TYPES, UNSIGNED, Lanes, Machine, Mask, Step
from ptx.number_formats import bf16_to_f32, f32_to_bf16
from ptx.parser import Instruction
from ptx.transfers import registers_of

COMPARE: dict[str, Callable] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal,
    "hi": np.greater, "hs": np.greater_equal, "neu": np.not_equal,
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b), "geu": lambda a, b: ~(a < b),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
}  # fmt: skip
LOGIC: dict[str, Callable] = {
    "and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, "not": np.logical_not,
}  # fmt: skip
ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _fma(a: Lanes, b: Lanes, c: Lanes) -> Lanes:
    """One rounding: float64 holds the product of two float32 exactly."""
    return (a.astype(np.float64) * b.astype(np.float64) + c).astype(np.result_type(a, b))


def _fma_down(a: Lanes, b: Lanes, c: Lanes) -> Lanes:
    """Rounded towards -∞."""
    exact = a.astype(np.float64) * b.astype(np.float64) + c
    nearest = exact.astype(np.float32)
    return np.where(nearest > exact, np.nextafter(nearest, np.float32(-np.inf)), nearest)


def _divide(a: Lanes, b: Lanes) -> Lanes:
    if a.dtype.kind == "f":
        return a / b
    quotient = np.abs(a.astype(np.int64)) // np.maximum(np.abs(b.astype(np.int64)), 1)
    return np.sign(a).astype(np.int64) * np.sign(b) * quotient


ELEMENTWISE: dict[str, Callable] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": _divide,
    "mad": lambda a, b, c: a * b + c, "fma": _fma,
    "rem": lambda a, b: np.fmod(a, np.where(b == 0, 1, b)),
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    "neg": np.negative, "abs": np.abs, "max": np.fmax, "min": np.fmin,
    "rcp": np.reciprocal, "sqrt": np.sqrt, "rsqrt": lambda a: 1 / np.sqrt(a),
    "ex2": np.exp2, "lg2": np.log2, "tanh": np.tanh, "sin": np.sin, "cos": np.cos,
    "copysign": lambda a, b: np.copysign(b, a),
}  # fmt: skip
KEEPING_NAN = {"max": np.maximum, "min": np.minimum}


def arithmetic(machine: Machine, instruction: Instruction) -> Step:
    """Everything that computes; NotImplementedError names an instruction that nobody needed yet."""
    parts = instruction.parts
    special = {
        "mov": _move, "cvt": _convert, "cvta": _change_space, "setp": _compare, "selp": _select,
        "bfe": bits.extract_bits, "prmt": bits.permute_bytes, "lop3": bits.three_input_logic,
        "shl": bits.shift, "shr": bits.shift, "elect": _elect, "shf": bits.funnel_shift,
        "clz": bits.leading_zeros, "bfi": bits.insert_bits,
    }  # fmt: skip
    if parts[0] in special:
        return special[parts[0]](machine, instruction)
    if parts[-1] == "pred":
        return _simple(machine, instruction, LOGIC[parts[0]])
    if parts[0] not in ELEMENTWISE:
        raise NotImplementedError(str(instruction))
    if parts[-1] in ("bf16", "bf16x2", "f16x2"):
        return _packed(machine, instruction)
    if "wide" in parts:
        return _widening(machine, instruction)
    if "hi" in parts:
        return _high_half(machine, instruction)
    if parts[0] == "fma" and "rm" in parts:
        return _simple(machine, instruction, _fma_down)
    return _simple(machine, instruction, _function(parts))


def _function(parts: Sequence[str]) -> Callable:
    return (KEEPING_NAN if "NaN" in parts else ELEMENTWISE)[parts[0]]


def _simple(machine: Machine, instruction: Instruction, function: Callable) -> Step:
    kind = instruction.parts[-1]
    target, *names = instruction.operands
    sources = [machine.source(name, kind) for name in names]
    flush = "ftz" in instruction.parts and kind == "f32"

    def step(mask: Mask) -> None:
        values = [source() for source in sources]
        if flush:
            values = [_flush(value) for value in values]
        result = np.asarray(function(*values))
        if kind != "pred":
            result = result.astype(TYPES[kind], copy=False)
        machine.write(target, _flush(result) if flush else result, mask)

    return step


def _flush(x: Lanes) -> Lanes:
    """Subnormal numbers become zero."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x)


def _packed(machine: Machine, instruction: Instruction) -> Step:
    """bfloat16, and pairs of 16-bit numbers, computed in float32 and rounded."""
    kind = instruction.parts[-1]
    raw = "b32" if kind.endswith("x2") else "b16"
    target, *names = instruction.operands
    sources = [machine.source(name, raw) for name in names]
    function, is_bf16 = _function(instruction.parts), kind.startswith("bf16")

    def decode(bits: Lanes) -> Lanes:
        halves = machine.on_all_lanes(bits).copy().view(np.uint16)
        return bf16_to_f32(halves) if is_bf16 else halves.view(np.float16).astype(np.float32)

    def step(mask: Mask) -> None:
        value = function(*(decode(source()) for source in sources))
        halves = f32_to_bf16(value) if is_bf16 else value.astype(np.float16).view(np.uint16)
        machine.write(target, halves.view(TYPES[raw]), mask)

    return step


def _widening(machine: Machine, instruction: Instruction) -> Step:
    narrow = instruction.parts[-1]
    wide = narrow[0] + str(2 * int(narrow[1:]))
    target, a, b, *c = instruction.operands
    factors = [machine.source(name, narrow) for name in (a, b)]
    addend = machine.source(c[0], wide) if c else None

    def step(mask: Mask) -> None:
        left, right = (factor().astype(TYPES[wide]) for factor in factors)
        machine.write(target, left * right + (addend() if addend else TYPES[wide](0)), mask)

    return step


def _high_half(machine: Machine, instruction: Instruction) -> Step:
    kind = instruction.parts[-1]
    target, a, b, *c = instruction.operands
    sources = [machine.source(name, kind) for name in (a, b)]
    addend = machine.source(c[0], kind) if c else None
    wide = np.int64 if kind[0] == "s" else np.uint64

    def step(mask: Mask) -> None:
        left, right = (source().astype(wide) for source in sources)
        high = ((left * right) >> wide(32)).astype(TYPES[kind])
        machine.write(target, high + addend() if addend else high, mask)

    return step


def _move(machine: Machine, instruction: Instruction) -> Step:
    kind, (target, source) = instruction.parts[-1], instruction.operands
    if target.startswith("{"):
        return _unpack(machine, registers_of(target), machine.source(source, kind))
    if source.startswith("{"):
        return _pack(machine, target, registers_of(source), kind)
    value = machine.source(source, kind)
    return lambda mask: machine.write(target, value(), mask)


def _unpack(machine: Machine, targets: list[str], source: Callable[[], Lanes]) -> Step:
    def step(mask: Mask) -> None:
        value = machine.on_all_lanes(source()).copy()
        part = UNSIGNED[value.dtype.itemsize // len(targets)]
        columns = value.view(part).reshape(machine.lanes, -1)
        for i, target in enumerate(targets):
            machine.write(target, np.ascontiguousarray(columns[:, i]), mask)

    return step


def _pack(machine: Machine, target: str, names: list[str], kind: str) -> Step:
    bits = 8 * np.dtype(TYPES[kind]).itemsize // len(names)
    sources = [machine.source(name, f"b{bits}") for name in names]

    def step(mask: Mask) -> None:
        columns = [machine.on_all_lanes(source()) for source in sources]
        machine.write(target, np.stack(columns, 1).view(TYPES[kind]).reshape(-1), mask)

    return step


def _change_space(machine: Machine, instruction: Instruction) -> Step:
    """Generic addresses: global ones stay, and no kernel here makes one of shared memory."""
    if "shared" in instruction.parts:
        raise NotImplementedError("generic addresses of shared memory")
    target, source = instruction.operands
    value = machine.source(source, instruction.parts[-1])
    return lambda mask: machine.write(target, value(), mask)


def _convert(machine: Machine, instruction: Instruction) -> Step:
    *modes, to, source_kind = instruction.parts
    target, *names = instruction.operands
    if to in ("f16x2", "bf16x2"):
        return _convert_pair(machine, target, names, to)
    if source_kind == "bf16":
        bits = machine.source(names[0], "b16")

        def value() -> Lanes:
            return bf16_to_f32(bits())
    else:
        value = machine.source(names[0], source_kind)
    rounding = next((ROUND[mode] for mode in modes if mode in ROUND), None)
    saturate = "sat" in modes and to[0] == "f"

    def step(mask: Mask) -> None:
        result = _converted(value(), to, rounding)
        if saturate:  # NaN becomes 0
            result = np.fmax(np.fmin(result, result.dtype.type(1)), result.dtype.type(0))
        machine.write(target, result, mask)

    return step


def _converted(value: Lanes, to: str, rounding: Callable | None) -> Lanes:
    if to == "bf16":
        return f32_to_bf16(value.astype(np.float32))
    if to == "tf32":
        return (value.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    if rounding is not None:
        value = rounding(value)
        if to[0] != "f":
            limits = np.iinfo(TYPES[to])
            value = np.clip(np.nan_to_num(value.astype(np.float64)), limits.min, limits.max)
    return value.astype(TYPES[to])


def _convert_pair(machine: Machine, target: str, names: list[str], to: str) -> Step:
    """Two float32 into one register, the first into the upper half."""
    high, low = (machine.source(name, "f32") for name in names)

    def encode(x: Lanes) -> Lanes:
        half = f32_to_bf16(x) if to == "bf16x2" else x.astype(np.float16).view(np.uint16)
        return half.astype(np.uint32)

    return lambda mask: machine.write(target, (encode(high()) << 16) | encode(low()), mask)


def _compare(machine: Machine, instruction: Instruction) -> Step:
    comparison, kind = COMPARE[instruction.parts[1]], instruction.parts[-1]
    combine = LOGIC.get(instruction.parts[2])
    target, *negated = instruction.operands[0].split("|")
    a, b = (machine.source(name, kind) for name in instruction.operands[1:3])
    other = machine.source(instruction.operands[3], "pred") if combine else None

    def step(mask: Mask) -> None:
        result = comparison(a(), b())
        outcomes = [result, ~result]
        if combine:
            outcomes = [combine(outcome, other()) for outcome in outcomes]
        for register, outcome in zip([target, *negated], outcomes, strict=False):
            machine.write(register, outcome, mask)

    return step


def _select(machine: Machine, instruction: Instruction) -> Step:
    kind, (target, a, b, choice) = instruction.parts[-1], instruction.operands
    first, second = machine.source(a, kind), machine.source(b, kind)
    condition = machine.source(choice, "pred")
    return lambda mask: machine.write(target, np.where(condition(), first(), second()), mask)


def _elect(machine: Machine, instruction: Instruction) -> Step:
    """elect.sync: the first lane of the warp."""
    leader, chosen = instruction.operands[0].split("|")

    def step(mask: Mask) -> None:
        machine.write(leader, np.zeros(machine.lanes, np.uint32), mask)
        machine.write(chosen, np.arange(machine.lanes) % 32 == 0, mask)

    return step

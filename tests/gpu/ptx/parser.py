"""PTX text → kernels: parameters, registers, shared memory, and instructions in execution order."""

import re
from dataclasses import dataclass, field, replace
from functools import cached_property


@dataclass(frozen=True)
class Instruction:
    """One instruction; `guard` is the predicate that enables it, "!" in front if negated."""

    opcode: str
    operands: tuple[str, ...]
    guard: str | None = None
    where: str = ""

    @cached_property
    def parts(self) -> list[str]:
        return self.opcode.split(".")

    @cached_property
    def widths(self) -> dict[str, int]:
        """Bytes that it accesses at once, of global and of shared memory."""
        name, kind = self.parts[0], self.parts[-1]
        if name in ("ld", "st") and "param" not in self.parts:
            shared = any(part.startswith("shared") for part in self.parts)
            vector = re.search(r"\.v(\d)", self.opcode)
            count = int(vector[1]) if vector else 1
            return {"shared" if shared else "global": int(kind[1:]) // 8 * count}
        if name == "cp" and len(self.operands) > 2:
            return dict.fromkeys(("global", "shared"), int(self.operands[2], 0))
        return {}

    def __str__(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)} ({self.where})"


@dataclass
class Kernel:
    """One entry point.

    `shared` maps names to offsets; memory that the launch sizes has None. `parameters` are names
    and types; a structure has the type b8[size].
    """

    name: str
    parameters: list[tuple[str, str]]
    registers: dict[str, str] = field(default_factory=dict)
    shared: dict[str, int | None] = field(default_factory=dict)
    static_shared: int = 0
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def with_code(self, code: list[Instruction]) -> "Kernel":
        """The same kernel with other instructions at the same places."""
        return replace(self, code=code)


def search(pattern: str | re.Pattern[str], text: str) -> re.Match[str]:
    """The first match in `text`; ValueError if there is none."""
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"no {pattern} in: {text[:200]}")
    return match


_PARAMETER = re.compile(
    r"\.param(?:\s+\.align\s+\d+)?\s+\.(\w+)[^,]*?([\w$]+)(\[\d+\])?\s*(?:,|$)")
_SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.b(\d+)\s+([\w$]+)(?:\[(\d+)\])?")
_LABEL = re.compile(r"([$\w%]+):(?!:)")
_INSTRUCTION = re.compile(r"^(?:@(!?%?[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")


def parse(text: str, name: str = "") -> Kernel:
    """The entry point of a PTX module whose name contains `name`; the first of several."""
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.M))
    name = re.escape(name)
    head = search(rf"(?s)\.entry\s+([\w$]*{name}[\w$]*)\s*\((.*?)\)([^{{]*)\{{", text)
    parameters = [(p[2], p[1] + (p[3] or "")) for p in _PARAMETER.finditer(head[2])]
    kernel = Kernel(head[1], parameters)
    for name in re.findall(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[", text):
        kernel.shared[name] = None
    where = ""
    for statement in re.split(r";|\n", re.sub(r"//[^\n]*", "", _body(text, head.end()))):
        statement = _strip_labels(kernel, statement.strip())
        if statement.startswith(".loc"):
            _, file, line, *_ = statement.split()
            where = f"{files.get(file, '?').rsplit('/', 1)[-1]}:{line}"
        elif statement.startswith(".reg"):
            _declare_registers(kernel, statement)
        elif statement.startswith(".shared"):
            _declare_shared(kernel, search(_SHARED, statement))
        elif statement and not statement.startswith("."):
            while statement.count("}") > statement.count("{"):  # the end of a scope
                statement = "".join(statement.rpartition("}")[::2]).strip()
            guard, opcode, operands = search(_INSTRUCTION, statement).groups()
            operands = tuple(o.strip() for o in _OPERAND.findall(operands))
            kernel.code.append(Instruction(opcode, operands, guard, where))
    return in_execution_order(kernel)


def registers_of(operand: str) -> list[str]:
    """{%r1, %r2} → the names; a single one is a list of one."""
    return [name.strip() for name in operand.strip("{}").split(",")]


def narrowest_access(kernel: Kernel, space: str) -> int:
    """The least width in bytes of the kernel's accesses to global or shared memory, at most 16."""
    return min([16, *(ins.widths[space] for ins in kernel.code if space in ins.widths)])


def _body(text: str, start: int) -> str:
    depth, brackets = 1, re.compile("[{}]").finditer(text, start)
    while depth:
        bracket = next(brackets)
        depth += 1 if bracket[0] == "{" else -1
    return text[start : bracket.start()]


def _strip_labels(kernel: Kernel, statement: str) -> str:
    """The statement without the labels and scope brackets in front of it."""
    while statement:
        label = _LABEL.match(statement)
        if label:
            kernel.labels[label[1]] = len(kernel.code)
            statement = statement[label.end() :].strip()
        elif statement[0] in "{}":
            statement = statement[1:].strip()
        else:
            break
    return statement


def _declare_registers(kernel: Kernel, statement: str) -> None:
    kind, names = search(r"\.reg\s+\.(\w+)\s+(.*)", statement).groups()
    for name in names.split(","):
        stem, count = search(r"^\s*(%?[\w$]+)(?:<(\d+)>)?", name).groups()
        for register in [f"{stem}{i}" for i in range(int(count))] if count else [stem]:
            kernel.registers[register] = kind


def _declare_shared(kernel: Kernel, match: re.Match) -> None:
    align, bits, name, count = match.groups()
    offset = -(-kernel.static_shared // int(align)) * int(align)
    kernel.shared[name] = offset
    kernel.static_shared = offset + int(bits) // 8 * int(count or 1)


def in_execution_order(kernel: Kernel) -> Kernel:
    """The kernel with its basic blocks in reverse postorder of the flow graph.

    The machine always runs the threads that are furthest behind, so that threads that diverged meet
    where their paths join. That needs an order in which every block comes before the blocks that
    follow it, which compilers do not guarantee.
    """
    starts = sorted({0, *kernel.labels.values()} | {
        i + 1 for i, ins in enumerate(kernel.code) if ins.parts[0] in ("bra", "ret", "exit")
    })  # fmt: skip
    starts = [s for s in starts if s < len(kernel.code)]
    ends = dict(zip(starts, [*starts[1:], len(kernel.code)], strict=True))
    order = _reverse_postorder(kernel, ends)
    at, code = {}, []
    for position, start in enumerate(order):
        at[start] = len(code)
        code += kernel.code[start : ends[start]]
        falls_to = ends[start]
        follower = order[position + 1] if position + 1 < len(order) else None
        if _falls_through(code[-1]) and falls_to in ends and falls_to != follower:
            code.append(Instruction("bra.uni", (f"@{falls_to}",)))
    labels = {name: at[index] for name, index in kernel.labels.items() if index in at}
    labels |= {f"@{start}": place for start, place in at.items()}
    return replace(kernel, code=code, labels=labels)


def _falls_through(instruction: Instruction) -> bool:
    return instruction.guard is not None or instruction.parts[0] not in ("bra", "ret", "exit")


def _reverse_postorder(kernel: Kernel, ends: dict[int, int]) -> list[int]:
    """Start indices of the blocks that can be reached."""
    finished: list[int] = []
    seen: set[int] = {0}

    def followers(start: int) -> list[int]:
        last, found = kernel.code[ends[start] - 1], []
        if last.parts[0] == "bra":
            found.append(kernel.labels[last.operands[0]])
        if _falls_through(last) and ends[start] in ends:
            found.append(ends[start])
        # A loop's body goes before what follows the loop: visited last, it comes first.
        return sorted(found, key=lambda f: f <= start)

    stack = [(0, iter(followers(0)))]
    while stack:
        block, rest = stack[-1]
        for follower in rest:
            if follower not in seen and follower in ends:
                seen.add(follower)
                stack.append((follower, iter(followers(follower))))
                break
        else:
            finished.append(block)
            stack.pop()
    return finished[::-1]

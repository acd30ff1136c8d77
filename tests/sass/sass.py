"""What a dump of a compiled kernel says: the main loop's instructions, and whether registers are used too early.

A wgmma (QGMMA, HGMMA) runs on while the warps go on issuing. Until a WARPGROUP.DEPBAR has waited for it, the registers
of its A operand must not be written, and those of its accumulator neither read nor written. ptxas may compile such a
race without a note. So the state of the tensor core, which is the wgmmas in flight, is followed here along all paths
of the program, back edges included.
"""

import collections
import dataclasses
import re
from typing import NamedTuple, Self

_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+)?\s*([A-Z][\w.]*)\s*([^;]*)")
_REGISTER = re.compile(r"\bR(\d+)\b")
_PREDICATE = re.compile(r"!?U?P(\d|T)$")
# Of these, a register that comes first is read.
_NO_RESULT = ("ISETP", "FSETP", "DSETP", "HSETP2", "PSETP", "PLOP3", "R2P", "FCHK")


class Instruction(NamedTuple):
    address: str
    guard: str  # the predicate that it is issued under, or ""
    opcode: str
    operands: tuple[str, ...]

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".")[0]

    @property
    def is_wgmma(self) -> bool:
        return self.name.endswith("GMMA")

    @property
    def registers(self) -> set[int]:
        """All vector registers that it names, and the ranges that it means by them."""
        named = [(i, int(r)) for i, operand in enumerate(self.operands) for r in _REGISTER.findall(operand)]
        wide = [i for i, operand in enumerate(self.operands) if re.match(r"R\d+$", operand)]
        if self.is_wgmma:
            return set().union(*self.wgmma_registers)
        width = self._width
        # In stores the data come last, in loads first.
        ranged = wide[-1:] if self.name.startswith("ST") else wide[:1]
        return {r + j for i, r in named for j in range(width if i in ranged else 1)}

    @property
    def written(self) -> set[int]:
        """Vector registers of its result; not for wgmma."""
        if self.name in _NO_RESULT:
            return set()
        operands = [operand for operand in self.operands if not _PREDICATE.match(operand)]
        if not operands or not (m := re.match(r"R(\d+)$", operands[0])):
            return set()
        return set(range(int(m[1]), int(m[1]) + self._width))

    @property
    def read(self) -> set[int]:
        """Vector registers that an instruction with a result computes it from."""
        operands = [operand for operand in self.operands if not _PREDICATE.match(operand)]
        return {int(r) for operand in operands[1:] for r in _REGISTER.findall(operand)}

    @property
    def wgmma_registers(self) -> tuple[set[int], set[int]]:
        """Of the accumulator and of the A operand."""
        shape, accumulator_bits = re.search(r"64x(\d+)x\d+\.F(\d+)", self.opcode).groups()
        accumulator, a = (re.match(r"R(\d+)$", operand) for operand in self.operands[:2])
        count = int(shape) * int(accumulator_bits) // 64
        return (
            set(range(int(accumulator[1]), int(accumulator[1]) + count)),
            set(range(int(a[1]), int(a[1]) + 4)) if a else set(),
        )

    @property
    def _width(self) -> int:
        if m := re.search(r"\.(64|128)\b", self.opcode):
            return int(m[1]) // 32
        if m := re.match(r"LDSM.*\.(\d)$", self.opcode):  # matrices
            return int(m[1])
        return 2 if ".WIDE" in self.opcode or self.opcode == "CS2R" else 1


@dataclasses.dataclass(frozen=True)
class Program:
    """The instructions of a kernel, and which of them labels name."""

    instructions: list[Instruction]
    labels: dict[str, int]

    @classmethod
    def parse(cls, dump: str) -> Self:
        instructions, labels = [], {}
        for line in dump.splitlines():
            if m := _LABEL.match(line.strip()):
                labels[m[1]] = len(instructions)
            elif m := _INSTRUCTION.search(line):
                operands = tuple(operand.strip().replace(".reuse", "") for operand in m[4].split(","))
                instructions.append(Instruction(m[1], m[2] or "", m[3], tuple(o for o in operands if o)))
        return cls(instructions, labels)

    def target(self, i: int) -> int | None:
        """Where instruction i may branch to."""
        if self.instructions[i].name == "BRA" and (m := re.search(r"\.L_x_\d+", self.instructions[i].operands[-1])):
            return self.labels.get(m[0])
        return None

    def successors(self, i: int) -> list[int]:
        """Which instructions may come after instruction i. Calls are taken to return."""
        instruction, target = self.instructions[i], self.target(i)
        always = not instruction.guard and len(instruction.operands) <= 1
        ends = instruction.name in ("EXIT", "RET", "BRA") and always
        return [j for j in (None if ends else i + 1, target) if j is not None and j < len(self.instructions)]

    def main_loops(self) -> list[range]:
        """The innermost loops with a wgmma."""
        loops = []
        for end in range(len(self.instructions)):
            start = self.target(end)
            if start is None or not any(self.instructions[i].is_wgmma for i in range(start, end + 1)):
                continue
            # Waiting is moved out of a loop, to the end of the program; branching back from there makes no loop.
            if end not in self._reachable_without(start):
                loops.append(range(start, end + 1))
        return [a for a in loops if not any(a != b and b.start >= a.start and b.stop <= a.stop for b in loops)]

    def _reachable_without(self, avoided: int) -> set[int]:
        reached: set[int] = set()
        todo = [0]
        while todo:
            if (i := todo.pop()) not in reached and i != avoided:
                reached.add(i)
                todo += self.successors(i)
        return reached

    def operand_makers(self, loop: range) -> list[int]:
        """The instructions of a loop that make A operands of its wgmmas out of what was loaded, loads not included."""
        makers, wanted = [], set[int]()
        for i in reversed(loop):
            instruction = self.instructions[i]
            if instruction.is_wgmma:
                wanted |= instruction.wgmma_registers[1]
            elif made := instruction.written & wanted:
                wanted -= made if not instruction.guard else set()
                if not instruction.name.startswith("LD"):
                    makers.append(i)
                    wanted |= instruction.read
        return makers[::-1]

    def in_flight(self) -> list[set["Flight"]]:
        """For each instruction, the states of the tensor core that it may be issued in."""
        return self._flow([(0, Flight())], set(range(len(self.instructions))))

    def in_flight_repeating(self, loop: range) -> list[set["Flight"]]:
        """The same for the instructions of a loop, but its first pass."""
        end = loop.stop - 1
        repeating = {state.after(self.instructions[end]) for state in self.in_flight()[end]}
        return self._flow([(loop.start, state) for state in repeating], self._body(loop))

    def _body(self, loop: range) -> set[int]:
        """Instructions on paths from the loop's start to its end, wherever they are."""
        before: dict[int, list[int]] = {}
        for i in range(len(self.instructions)):
            for j in self.successors(i):
                before.setdefault(j, []).append(i)
        body, todo = {loop.start}, [loop.stop - 1]
        while todo:
            if (i := todo.pop()) not in body:
                body.add(i)
                todo += before.get(i, [])
        return body

    def _flow(self, todo: list[tuple[int, "Flight"]], within: set[int]) -> list[set["Flight"]]:
        states: list[set[Flight]] = [set() for _ in self.instructions]
        while todo:
            i, state = todo.pop()
            if i in within and state not in states[i]:
                states[i].add(state)
                after = state.after(self.instructions[i])
                todo += [(j, after) for j in self.successors(i)]
        return states


class Flight(NamedTuple):
    """wgmmas in flight, each as its (accumulator, A operand): those in committed groups, and those in none yet."""

    committed: tuple[frozenset[tuple[frozenset[int], frozenset[int]]], ...] = ()
    uncommitted: frozenset[tuple[frozenset[int], frozenset[int]]] = frozenset()

    def after(self, instruction: Instruction) -> "Flight":
        committed, uncommitted = self
        if instruction.is_wgmma:
            accumulator, a = instruction.wgmma_registers
            uncommitted = uncommitted | {(frozenset(accumulator), frozenset(a))}
            if "gsb0" in instruction.operands:
                committed, uncommitted = (*committed, uncommitted), frozenset()
        elif instruction.opcode.startswith("WARPGROUP.DEPBAR"):
            allowed = int(instruction.operands[-1], 16)
            committed = committed[max(len(committed) - allowed, 0) :]
        # What runs without ever being waited for would make endless states.
        return Flight(committed[-8:], uncommitted)

    def conflicts(self, instruction: Instruction) -> set[int]:
        """Registers that the instruction may not use in this state as it does."""
        if instruction.is_wgmma:
            return set()
        running = [*self.uncommitted, *(wgmma for group in self.committed for wgmma in group)]
        accumulators = frozenset().union(*(accumulator for accumulator, _ in running))
        operands = frozenset().union(*(a for _, a in running))
        return (instruction.registers & accumulators) | (instruction.written & operands)


@dataclasses.dataclass(frozen=True)
class Findings:
    """About one kernel; counts are of the main loop (of the worst of them, where there are several).

    Attributes:
        instructions: for each wgmma.
        mix: the same by opcode.
        wgmma: its opcodes.
        alu: instructions with a result in a vector register, loads from shared memory included.
        exposed: those of them that may be issued with no wgmma in flight, other than in the loop's first pass.
        operands: instructions that make A operands out of what was loaded: the dequantization.
        operands_exposed: those of them that are `exposed`.
        hazards: uses of registers that a wgmma in flight needs, anywhere in the kernel.
        notes: ptxas's about wgmma (C75xx).
        spilled: bytes.
        highest_register: named.
    """

    instructions: float
    mix: dict[str, float]
    wgmma: list[str]
    alu: int
    exposed: list[str]
    operands: int
    operands_exposed: list[str]
    hazards: list[str]
    notes: list[str]
    spilled: int
    highest_register: int


def find(dump: str) -> Findings:
    """What a dump (ptxas's log and SASS) says about the one kernel in it that has a wgmma.

    Raises:
        ValueError: there is no such kernel, or more than one, or its wgmmas are in no loop.
    """
    kernels = [Program.parse(section) for section in re.split(r"^\s*\.section\s+\.text\.", dump, flags=re.MULTILINE)]
    kernels = [kernel for kernel in kernels if any(i.is_wgmma for i in kernel.instructions)]
    if len(kernels) != 1 or not kernels[0].main_loops():
        raise ValueError(f"expected one kernel with a wgmma, in a loop; found {len(kernels)} with a wgmma")
    (kernel,) = kernels
    program, states = kernel.instructions, kernel.in_flight()

    def wgmmas(loop: range) -> int:
        return sum(program[i].is_wgmma for i in loop)

    loops = kernel.main_loops()
    worst = max(loops, key=lambda loop: len(loop) / wgmmas(loop))
    repeating = {loop: kernel.in_flight_repeating(loop) for loop in loops}
    alu = [(i, repeating[loop][i]) for loop in loops for i in loop if not program[i].is_wgmma and program[i].written]
    makers = [(i, repeating[loop][i]) for loop in loops for i in kernel.operand_makers(loop)]
    mix = collections.Counter(program[i].name for i in worst)

    def exposed(issued: list[tuple[int, set[Flight]]]) -> list[str]:
        return [_describe(program[i]) for i, flights in issued if Flight() in flights]

    return Findings(
        instructions=len(worst) / wgmmas(worst),
        mix={name: count / wgmmas(worst) for name, count in mix.most_common()},
        wgmma=sorted({program[i].opcode for i in worst if program[i].is_wgmma}),
        alu=len(alu),
        exposed=exposed(alu),
        operands=len(makers),
        operands_exposed=exposed(makers),
        hazards=[
            f"{_describe(instruction)} uses {', '.join(f'R{r}' for r in sorted(conflicts))}"
            for instruction, flights in zip(program, states, strict=True)
            if (conflicts := set().union(*(flight.conflicts(instruction) for flight in flights)))
        ],
        notes=sorted(set(re.findall(r"\(C75\d\d\)[^\n]*", dump))),
        spilled=sum(int(count) for count in re.findall(r"(\d+) bytes spill", dump)),
        highest_register=max(max(instruction.registers, default=0) for instruction in program),
    )


def _describe(instruction: Instruction) -> str:
    operands = ", ".join(instruction.operands)
    return f"{instruction.address}: {instruction.guard} {instruction.opcode} {operands}".replace("  ", " ")

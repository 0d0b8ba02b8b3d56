"""The emulated machine itself, on PTX written by hand: what compilers do with parameters."""

import math

import numpy as np
import pytest

from ptx.machine import RED_ZONE, Machine, room
from ptx.memory import Fault
from ptx.parser import Kernel, parse
from ptx.trace import Trace

ENTRY = """
.visible .entry parameters(.param .u64 p_0, .param .u32 p_1, .param .u32 p_2,
                           .param .align 8 .b8 p_3[16])
{
    .reg .pred %p<2>; .reg .b32 %r<9>; .reg .b64 %rd<5>;
    ld.param.b64 %rd1, [p_0];
    mov.u32 %r1, %tid.x;
    setp.lt.u32 %p1, %r1, 16;
    mul.wide.u32 %rd2, %r1, 4;
    add.s64 %rd1, %rd1, %rd2;
    <code>
    st.global.b32 [%rd1], %r2;
    ret;
}
"""
# Threads below 16 get the first number, the others the second.
LOADS = {
    "by name": ("ld.param.b32 %r3, [p_1]; ld.param.b32 %r4, [p_2]; selp.b32 %r2, %r3, %r4, %p1;",
                (11, 22)),
    "64-bit address": ("""mov.b64 %rd3, p_1; mov.b64 %rd4, p_2; selp.b64 %rd3, %rd3, %rd4, %p1;
                          ld.param.b32 %r2, [%rd3];""", (11, 22)),
    "32-bit address": ("""mov.b32 %r3, p_1; mov.b32 %r4, p_2; selp.b32 %r3, %r3, %r4, %p1;
                          ld.param.b32 %r2, [%r3];""", (11, 22)),
    "generic address": ("""mov.b64 %rd3, p_2; cvta.param.u64 %rd3, %rd3;
                           cvta.to.param.u64 %rd4, %rd3; ld.param.b32 %r2, [%rd4];""", (22, 22)),
    "address plus offset": ("mov.b64 %rd3, p_3; add.s64 %rd3, %rd3, 4; "
                            "ld.param.b32 %r2, [%rd3+8];", (36, 36)),
    "vector": ("ld.param.v2.b32 {%r3, %r4}, [p_3+8]; selp.b32 %r2, %r3, %r4, %p1;", (35, 36)),
    "vector by address": ("""mov.b32 %r5, p_3; ld.param.v4.b32 {%r6, %r7, %r3, %r4}, [%r5];
                             selp.b32 %r2, %r6, %r4, %p1;""", (33, 36)),
    "some threads": ("""mov.b32 %r2, 7; @!%p1 bra $skip; mov.b64 %rd3, p_1;
                        ld.param.b32 %r2, [%rd3]; $skip: add.s32 %r2, %r2, 0;""", (11, 7)),
}


def run(code: str) -> list[int]:
    machine = Machine(RED_ZONE + room(128))
    at = machine.put(np.zeros(128, np.uint8))
    structure = np.array([33, 34, 35, 36], np.uint32).tobytes()
    machine.launch(parse(ENTRY.replace("<code>", code)), (1,), 32, [at, 11, 22, structure], 0)
    return machine.get(at, 128).view(np.uint32).tolist()


@pytest.mark.parametrize("code, numbers", LOADS.values(), ids=LOADS.keys())
def test_parameters_are_loaded(code: str, numbers: tuple[int, int]) -> None:
    assert run(code) == [numbers[0]] * 16 + [numbers[1]] * 16


def test_parameters_end_somewhere() -> None:
    with pytest.raises(Fault, match="parameters"):
        run("mov.b64 %rd3, p_3; ld.param.b32 %r2, [%rd3+16];")


# Two warps; what they do to shared memory, and which of the barriers (numbered) can go.
SHARED = """
.visible .entry exchange(.param .u64 p_0)
{
    .reg .b32 %r<9>; .reg .b64 %rd<5>;
    .shared .align 16 .b8 buffer[512];
    ld.param.b64 %rd1, [p_0];
    mov.u32 %r1, %tid.x; mov.b32 %r2, buffer; shl.b32 %r3, %r1, 2; add.s32 %r4, %r2, %r3;
    xor.b32 %r3, %r3, 128; add.s32 %r5, %r2, %r3;
    <code>
    ret;
}
"""
OWN, OTHER = "[%r4]", "[%r5]"  # the thread's word, and that of its like in the other warp
STORE, LOAD, BARRIER = "st.shared.b32 {}, %r1;", "ld.shared.b32 %r6, {};", "bar.sync 0;"
EXCHANGES = {
    "needed": ([STORE.format(OWN), BARRIER, LOAD.format(OTHER)], []),
    "its own word": ([STORE.format(OWN), BARRIER, LOAD.format(OWN)], [0]),
    "read, then overwritten": (
        [STORE.format(OWN), BARRIER, LOAD.format(OTHER), BARRIER, STORE.format(OWN)], []),
    "one of two": ([STORE.format(OWN), BARRIER, BARRIER, LOAD.format(OTHER)], [0, 1]),
    "reads only": (
        [STORE.format(OWN), BARRIER, LOAD.format(OTHER), BARRIER, LOAD.format(OWN)], [1]),
    "at the end": ([STORE.format(OWN), BARRIER, LOAD.format(OTHER), BARRIER], [1]),
    "all store the same": (["st.shared.b32 [%r2], 7;", BARRIER, "ld.shared.b32 %r6, [%r2];"], []),
    "another buffer": ([STORE.format(OWN), BARRIER, STORE.format("[%r4+256]"), BARRIER,
                        LOAD.format(OTHER), LOAD.format("[%r5+256]")], [0]),
}


@pytest.mark.parametrize("steps, spare", EXCHANGES.values(), ids=EXCHANGES.keys())
def test_spare_barriers(steps: list[str], spare: list[int]) -> None:
    """The race check agrees: it faults without one of the barriers that are not spare, only."""
    trace, kernel = exchange(steps)
    places = [i for i, ins in enumerate(kernel.code) if ins.parts[0] == "bar"]
    assert [i for i, place in enumerate(places) if trace.spare_barrier(place)] == spare
    check_without_each(steps, (BARRIER,), spare, "race")


def check_without_each(
    steps: list[str], dropped: tuple[str, ...], spare: list[int], message: str
) -> None:
    """Without one of the steps in `dropped` the exchange faults, unless that one is spare."""
    at = [i for i, step in enumerate(steps) if step in dropped]
    for i, step in enumerate(at):
        without = steps[:step] + steps[step + 1 :]
        if i in spare:
            exchange(without)
        else:
            with pytest.raises(Fault, match=message):
                exchange(without)


# Copies of the thread's word, and of one elsewhere; which of the waits (numbered) can go.
COPY = "cp.async.ca.shared.global [%r4], [%rd1], 4; cp.async.commit_group;"
ELSEWHERE = COPY.replace("%r4", "%r4+256")
WAIT, WAIT_ONE = "cp.async.wait_group 0;", "cp.async.wait_group 1;"
WAITS = {
    "needed": ([COPY, WAIT, BARRIER, LOAD.format(OTHER)], []),
    "its own word": ([COPY, WAIT, LOAD.format(OWN)], []),
    "nothing in flight": ([WAIT, COPY, WAIT, BARRIER, LOAD.format(OTHER)], [0]),
    "one of two": ([COPY, WAIT, WAIT, BARRIER, LOAD.format(OTHER)], [0, 1]),
    "before an earlier barrier": (
        [COPY, WAIT, BARRIER, WAIT, BARRIER, LOAD.format(OTHER)], [0, 1]),
    "before the only barrier": ([COPY, WAIT, BARRIER, WAIT, LOAD.format(OTHER)], [1]),
    "a later group": (
        [COPY, ELSEWHERE, WAIT_ONE, BARRIER, LOAD.format(OTHER), WAIT], []),
    "a later group, not read before": (
        [COPY, ELSEWHERE, WAIT_ONE, WAIT, BARRIER, LOAD.format(OTHER)], [0]),
    "stored over": ([COPY, WAIT, BARRIER, STORE.format(OTHER), WAIT], [1]),
    "never read": ([COPY, WAIT], []),
}


@pytest.mark.parametrize("steps, spare", WAITS.values(), ids=WAITS.keys())
def test_spare_waits(steps: list[str], spare: list[int]) -> None:
    """As above: without a wait that is not spare, data come too late, or never."""
    trace, kernel = exchange(steps)
    places = [i for i, ins in enumerate(kernel.code) if "wait_group" in ins.opcode]
    assert [i for i, at in enumerate(places) if trace.spare_wait(at, math.inf)] == spare
    check_without_each(
        steps, (WAIT, WAIT_ONE), spare, "race|in flight|before it is written")


def test_a_weaker_wait_is_spare_if_it_is_enough() -> None:
    trace, kernel = exchange([COPY, ELSEWHERE, WAIT, BARRIER, LOAD.format(OTHER), WAIT])
    place = next(i for i, ins in enumerate(kernel.code) if "wait_group" in ins.opcode)
    assert trace.spare_wait(place, 1) and not trace.spare_wait(place, 2)


def test_a_copy_that_lands_over_a_later_store_is_a_race() -> None:
    with pytest.raises(Fault, match="arrives over what was stored"):
        exchange([COPY, BARRIER, STORE.format(OTHER), BARRIER, WAIT])


def exchange(steps: list[str]) -> tuple[Trace, Kernel]:
    kernel = parse(SHARED.replace("<code>", "\n".join(steps)))
    machine = Machine(RED_ZONE + room(16), trace=True)
    machine.launch(kernel, (2,), 64, [machine.put(np.zeros(16, np.uint8))], 0)
    assert machine.trace is not None
    return machine.trace, kernel

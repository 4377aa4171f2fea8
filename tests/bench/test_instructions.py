"""bench/instructions.py: reading what callgrind wrote, and the table."""

from __future__ import annotations

from collections import Counter

from bench import instructions

PROFILE = """\
desc: Trigger: Client Request: avx2/dropout/64
positions: line
events: Ir
fl=(1) /a.cpp
fn=(1) void reg_kernels::avx2::(anonymous namespace)::Rows<float>::row<f(int)::{lambda(int)#1}>(int)
10 5
+3 7
fi=(2) /b.h
* 2
cfn=(2) reg_kernels::avx2::Rows<float>::row(int)::{lambda(long)#1}::operator()(long) const
calls=3 20
-1 1000
fe=(1)
12 1
fn=(2)
8 100
fn=(3) reg_kernels::baseline::other(int)
8 50
fn=(4) malloc
0 9
"""


def test_what_callgrind_wrote_is_read():
    costs = instructions.costs(PROFILE)
    assert list(costs.values()) == [15, 100, 50, 9]
    avx2 = instructions.of_leaves(costs, "avx2")
    assert avx2 == {"Rows::row": 115}
    assert instructions.of_leaves(costs, "baseline") == {"other": 50}


def test_table_is_of_one_element():
    more = instructions.SIZES[1] - instructions.SIZES[0]
    counts = {
        "case": {
            "avx2": Counter({"f": 2 * more, "once": 3}),
            "baseline": Counter({"f": 4 * more, "g": more}),
        }
    }
    assert instructions.render(counts, ["avx2", "baseline"]).splitlines()[2:] == [
        "| case | 2.00 | 5.00 |",
        "| – `f` | 2.00 | 4.00 |",
        "| – `g` | 0.00 | 1.00 |",
    ]

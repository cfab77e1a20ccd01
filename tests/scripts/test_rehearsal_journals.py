"""The rehearsal reads journals and PTX."""

import textwrap

import numpy as np
import pytest
from rehearsal import checks
from rehearsal.journal import Entry, accesses, between, order_problem, parse, work
from rehearsal.ptx import float32_instructions, float64_problems, rounded_constants
from rehearsal_cases import Recorded

SGD = "void mxnet::op::mxnet_op::mxnet_generic_kernel<mxnet::op::SGDMomKernel, float*>(int, float*)"
JOURNAL = textwrap.dedent(
    f"""\
    MARK\tplain: forward
    MODULE\t12-000.ptx\t.target sm_80
    LAUNCH\t_Z7FusedKernel\tgrid=2x1x1 block=512x1x1\t0x10 0x20\tFusedKernel_add_(float*, float*)
    CALL\tcublasSgemm_v2\tm=36 n=3 k=1 mode=3\t0x30 c0x10 c(nil)
    MODE\tcublasSetMathMode\tmode=3
    KERNEL\t_ZSGD\tgrid=1x1x1 block=256x1x1\t0x40 0x10 0x50 0x60\t{SGD}
    COPY\tmemcpy\tbytes=12\t0x70 c0x80
    MARK\tplain: backward
    KERNEL\t_Zlast\tgrid"""
)


def test_a_journal_is_read_and_its_unfinished_line_left_out():
    entries = parse(JOURNAL)
    assert [e.kind for e in entries] == [
        "MARK", "MODULE", "LAUNCH", "CALL", "MODE", "KERNEL", "COPY", "MARK",
    ]  # fmt: skip
    assert [e.kind for e in work(entries)] == ["LAUNCH", "CALL", "KERNEL", "COPY"]
    product = entries[3]
    assert product.touched == ((0x30, False), (0x10, True), (0, True))
    assert (product.detail("mode"), product.detail("m"), product.detail("x")) == (3, 36, None)
    assert parse("") == []


def test_what_lies_between_marks():
    entries = parse(JOURNAL)
    assert between(entries, "plain: forward", "plain: backward") == entries[1:-1]
    with pytest.raises(ValueError, match="no mark 'later' in the journal"):
        between(entries, "plain: forward", "later")


@pytest.mark.parametrize(
    ("address", "letters"), [(0x10, "RRW"), (0x50, "R"), (0x40, "W"), (0x30, "W"), (0x99, "")]
)
def test_accesses_are_told_from_declarations(address, letters):
    assert accesses(parse(JOURNAL), address) == letters


@pytest.mark.parametrize(
    ("signature", "touched", "letters"),
    [
        ("void reduce(float const*, float*)", ((1, True), (2, False)), ("R", "W")),
        ("void generic(int, float*, float*)", ((1, False), (2, False)), ("W", "R")),
        ("void ex<binary_broadcast_kernel<2> >()", ((1, False), (2, False)), ("R", "W")),
    ],
)
def test_the_wheels_kernels_write_to_their_result(signature, touched, letters):
    entry = Entry("KERNEL", "_Z1k", "", touched, signature)
    assert tuple(accesses([entry], where) for where, _ in touched) == letters


def test_a_kernel_of_a_module_may_do_both_unless_it_says_const():
    entry = Entry("LAUNCH", "finish", "", ((1, False), (2, True)), "finish")
    assert (accesses([entry], 1), accesses([entry], 2)) == ("B", "R")


@pytest.mark.parametrize(
    ("letters", "writes", "problem"),
    [
        ("RRRW", 1, None),
        ("W", 1, None),
        ("RWRRW", 2, None),
        ("B", 1, None),
        ("RRWR", 1, "read after it was written: RRWR"),
        ("RWRWR", 2, "read after it was written: RWRWR"),
        ("RWW", 1, "written 2 times, not 1: RWW"),
        ("RR", 1, "written 0 times, not 1: RR"),
        ("", 1, "written 0 times, not 1: never touched"),
    ],
)
def test_order_of_reads_and_writes(letters, writes, problem):
    assert order_problem(letters, writes) == problem


def test_a_layer_called_twice_writes_twice():
    writes = [Entry("KERNEL", "_ZSGD", "", ((9, False), (1, False)), SGD)]
    marks = [Entry("MARK", f"x, twice, step 2: {part}") for part in ("forward", "backward")]
    held = {"running_mean": 1}
    order = [marks[0], *writes, *writes, marks[1]]
    assert checks.order_problems(order, "x, twice", held) == []
    order = [marks[0], *writes, marks[1]]
    assert checks.order_problems(order, "x, twice", held) == [
        "running_mean is written 1 times, not 2: W"
    ]


def test_work_is_that_of_a_step():
    entries = [
        *(Entry("MARK", "ours, step 2: forward"), Entry("KERNEL", "a"), Entry("MODE", "b")),
        *(Entry("MARK", "ours, step 2: backward"), Entry("CALL", "c"), Entry("SET", "d")),
        *(Entry("MARK", "ours, step 2: end"), Entry("KERNEL", "e")),
    ]
    forward, backward = checks.works_of_step(entries, "ours, step 2")
    assert [entry.name for entry in forward + backward] == ["a", "c", "d"]


def test_what_a_layer_adds_is_told_from_what_the_net_has():
    ones, zeros = (f"mxnet_generic_kernel<op_with_req<set_to_int<{n}>, 1>>(int)" for n in (1, 0))
    one_layer = [Entry("KERNEL", "a", "grid=1x1x1", ((1, True),), ones), Entry("LAUNCH", "moments")]
    another = Entry("LAUNCH", "moments", "grid=9x1x1", ((2, True),))
    filled = Entry("KERNEL", "b", "", (), zeros)
    copied = Entry("COPY", "memcpy", "bytes=64")
    more = checks.added(one_layer, [another, one_layer[0], filled, another, copied])
    assert [entry.short() for entry in more] == ["set_to_int<0>", "moments", "memcpy bytes=64"]


def test_launches_that_a_card_refuses_are_errors():
    entries = [Entry("REFUSED", "k"), Entry("REFUSED", "k"), Entry("MISSING", "cudaGraphLaunch")]
    assert checks.errors_of(checks.Scene("empty", None, {}, entries)) == [
        "empty: k launched with no blocks, 2 times",
        "empty: cudaGraphLaunch has no stand-in, 1 times",
    ]
    assert checks.errors_of(checks.Scene("empty", "died of signal 8")) == ["empty died of signal 8"]


def test_tf32_products_are_problems():
    def product(mode):
        return Entry("CALL", "cublasSgemm_v2", f"m=1 mode={mode}")

    (finding,) = checks.tf32(Recorded("portable", entries=[product(0), product(2)]))
    assert finding.problems == [] and finding.remark == "6 products"
    (finding,) = checks.tf32(Recorded("portable", entries=[product(3), product(3), product(0)]))
    assert finding.problems == ["recorded: 2 x cublasSgemm_v2 with TF32"] * 3


def test_float32_in_a_float64_module_is_a_problem():
    ptx = f".visible .entry fused(\n.param .u64 x)\n{DOUBLE}\trsqrt.approx.f32 %f1, %f2;\n"
    (finding,) = checks.float64(Recorded("portable", modules={"1.ptx": ptx}))
    assert finding.problems == ["fused: instruction rsqrt.approx.f32"]


@pytest.mark.parametrize(
    ("backend", "said"), [("native", ["dense: 9 launches, the bound is 8: {}"]), ("portable", [])]
)
def test_launches_have_a_bound(backend, said):
    """Of what two layers launch and three, the difference counts."""
    entries = []
    for count in (2, 3):
        for kind, forward in (("ours", 8), ("built-in", 1)):
            for part, launched in (("forward", forward), ("backward", 1), ("end", 0)):
                entries.append(Entry("MARK", f"{count} x {kind}, dense, step 2: {part}"))
                entries += [Entry("KERNEL", "k")] * (launched * count + 50 * (kind == "ours"))
    (finding,) = checks.launches(Recorded(backend, found={"dense": [4, 2]}, entries=entries))
    assert finding.problems == [problem.format("; ".join(["k"] * 9)) for problem in said]
    assert finding.remark == "dense: ours 8 + 1, built-in 1 + 1"


DOUBLE = "\tld.global.f64 \t%fd1, [%rd4];\n"


@pytest.mark.parametrize(
    "line",
    [
        "\tcvt.rn.f32.f64 \t%f1, %fd1;",
        "\tcvt.f64.f32 \t%fd2, %f1;",
        "\t@%p1 rsqrt.approx.ftz.f32 %f2, %f1;",
        "\tsqrt.rn.f32 %f3, %f2;",
        "\tmov.f32 %f4, 0f3F800000;",
    ],
)
def test_float32_instructions_are_found(line):
    name = line.split()[1] if "@" in line else line.split()[0]
    assert float64_problems(DOUBLE + line + "\n") == [f"instruction {name}"]
    assert float64_problems(line.replace("f64", "s32") + "\n") == []  # no float64 in it


def test_what_is_no_instruction_is_not_found():
    text = (
        DOUBLE + "\t.reg .f32 \t%f<3>;\n\t.param .f32 x,\n// add.f32\n\tadd.f64 %fd1, %fd2, %fd3;\n"
    )
    assert float32_instructions(text) == []


def test_constants_that_were_rounded_to_float32_are_found():
    def constant(value):
        return f"\tmul.f64 %fd1, %fd2, 0d{np.float64(value).view(np.uint64):016X};\n"

    for value in (0.9, 1e-5, 0.1, 1 / 3):
        rounded = float(np.float32(value))
        assert rounded_constants(constant(rounded)) == [rounded]
        assert rounded_constants(constant(value)) == []
    for exact in (0, 1, -1, 0.5, 2, 0.75, 1024, 65504, 1e5, np.inf):
        assert rounded_constants(constant(exact)) == []

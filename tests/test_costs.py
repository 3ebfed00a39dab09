"""Costs read from compiled programs: loops, collectives, products; of CPU, and as the TPU compiler writes them."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from r3jax.model.sharding import make_mesh
from r3jax.planning.costs import analyse

DEPTH, ROWS, WIDTH = 12, 32, 64


def layers(unroll: int):
    """A stack of matrices, as the decoder scans its layers."""

    def run(weights, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights, unroll=unroll)[0]

    shapes = jax.ShapeDtypeStruct((DEPTH, WIDTH, WIDTH), jnp.float32), jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
    return jax.jit(run).lower(*shapes).compile()


def test_a_loop_counts_as_often_as_it_runs():
    """XLA counts its body once; unrolled it counts right, and so does the HLO's own sum, both ways."""
    want = 2 * DEPTH * ROWS * WIDTH * WIDTH
    loop, flat = layers(1), layers(DEPTH)
    assert loop.cost_analysis()["flops"] < want / 4 < want <= flat.cost_analysis()["flops"] < 1.1 * want
    looped, unrolled = (analyse(program.as_text(), 1) for program in (loop, flat))
    assert looped.flops == unrolled.flops == want
    assert unrolled.bytes == flat.cost_analysis()["bytes accessed"]
    # A layer reads its own weights, not the stack.
    assert unrolled.bytes <= looped.bytes < 1.1 * unrolled.bytes


def test_a_loop_that_only_a_run_ends():
    def run(x):
        return jax.lax.while_loop(lambda s: (s[0] < 9) & (s[1].sum() < 5), lambda s: (s[0] + 1, s[1] @ s[1]), (0, x))

    code = jax.jit(run).lower(jax.ShapeDtypeStruct((16, 16), jnp.float32)).compile().as_text()
    one = 2 * 16**3
    assert [analyse(code, 1, trips).flops for trips in (0, 1, 9)] == [0, one, 9 * one]


def test_collectives_in_a_loop():
    """Weights gathered in each layer, a batch's loss reduced: bytes by hand."""
    mesh = make_mesh(2, 4, 1)

    def run(weights, x):
        def layer(x, w):
            return jnp.einsum("nd,df->nf", x, jax.reshard(w, P(None, None)), out_sharding=P("data", None)), None

        return (jax.lax.scan(layer, x, weights)[0] ** 2).sum()

    def abstract(shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        args = abstract((DEPTH, WIDTH, WIDTH), P(None, "fsdp", None)), abstract((ROWS, WIDTH), P("data", None))
        costs = analyse(jax.jit(run).lower(*args).compile().as_text(), 8)
    assert costs.flops == 2 * DEPTH * (ROWS / 2) * WIDTH**2
    found = {(c.kind, c.group): c for c in costs.collectives}
    gather = found["all-gather", 4]
    part = 4 * WIDTH * WIDTH / 4
    assert (gather.count, gather.operand_bytes, gather.wire_bytes) == (DEPTH, DEPTH * part, DEPTH * part * 3)
    assert gather.spread == 3  # neighbours: the mesh's order is data, fsdp
    reduce = found["all-reduce", 2]
    assert (reduce.count, reduce.operand_bytes, reduce.wire_bytes, reduce.spread) == (1, 4, 4, 4)


# What the TPU compiler writes, cut from the stage-1 step of a 0.5B model on v5e:4x4; no TPU compiler is needed here.
TPU = """HloModule jit_f, is_scheduled=true

%start (p.0: bf16[56,64]) -> (bf16[56,64], bf16[896,64]) {
  %p.0 = bf16[56,64]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.1 = bf16[896,64]{1,0} all-gather(%p.0), channel_id=7, replica_groups=mesh['a'=2,'b'=16] {'b'}
  ROOT %t = (bf16[56,64]{1,0:S(1)}, bf16[896,64]{1,0:T(8,128)(2,1)}) tuple(%p.0, %all-gather.1)
}

%async_collective_fusion.1 (p.1: bf16[56,64], p.2: bf16[896,64]) -> (bf16[896,64], f32[2,64,7,512]) {
  %p.1 = bf16[56,64]{1,0:S(1)} parameter(0)
  %p.2 = bf16[896,64]{1,0} parameter(1)
  %all-gather.2 = bf16[896,64]{1,0} all-gather(%p.1), channel_id=7, replica_groups=mesh['a'=2,'b'=16] {'b'}
  ROOT %t.1 = (bf16[896,64]{1,0}) tuple(%all-gather.2)
}

%body (s: (s32[], bf16[56,64])) -> (s32[], bf16[56,64]) {
  %s = (s32[]{:T(128)}, bf16[56,64]{1,0:S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %x = bf16[56,64]{1,0:S(1)} get-tuple-element(%s), index=1
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)S(6)} add(%i, %one)
  %started = (bf16[56,64]{1,0:S(1)}, bf16[896,64]{1,0}) fusion(%x), kind=kCustom, calls=%start
  %whole = bf16[896,64]{1,0} get-tuple-element(%started), index=1
  %meanwhile = (bf16[896,64]{1,0}) fusion(%x, %whole), kind=kCustom, calls=%async_collective_fusion.1
  ROOT %out = (s32[]{:T(128)}, bf16[56,64]{1,0:S(1)}) tuple(%next, %x)
}

%condition (s.1: (s32[], bf16[56,64])) -> pred[] {
  %limit = s32[]{:T(128)} constant(24)
  %s.1 = (s32[]{:T(128)}, bf16[56,64]{1,0:S(1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%s.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (a: bf16[56,64]) -> bf16[56,64] {
  %a = bf16[56,64]{1,0:S(1)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %begin = (s32[]{:T(128)}, /*index=1*/bf16[56,64]{1,0:S(1)}) tuple(%zero, %a)
  %loop = (s32[]{:T(128)}, bf16[56,64]{1,0:S(1)}) while(%begin), condition=%condition, body=%body
  ROOT %b = bf16[56,64]{1,0:S(1)} get-tuple-element(%loop), index=1
}
"""


def test_what_the_tpu_compiler_writes():
    """No trip counts, meshes as groups, one collective in several fusions, on-chip memory in layouts."""
    costs = analyse(TPU, 32)
    (gather,) = costs.collectives
    assert (gather.kind, gather.group, gather.spread, gather.count) == ("all-gather", 16, 15, 24)
    assert gather.operand_bytes == 24 * 56 * 64 * 2 and gather.wire_bytes == 15 * gather.operand_bytes
    assert costs.bytes == pytest.approx(24 * 896 * 64 * 2, rel=0.01)  # the gathered whole is written once a round


SCATTER = """HloModule jit_g, is_scheduled=true

%all-reduce-scatter (input: bf16[256,8192]) -> bf16[64,8192] {
  %input = bf16[256,8192]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-reduce.2 = bf16[256,8192]{1,0} all-reduce(%input), channel_id=3, replica_groups={{0,2,4,6},{1,3,5,7}}
  %first = s32[]{:T(128)} constant(0)
  ROOT %part = bf16[64,8192]{1,0} dynamic-slice(%all-reduce.2, %first, %first), dynamic_slice_sizes={64,8192}
}

ENTRY %main (a: bf16[256,8192]) -> bf16[64,8192] {
  %a = bf16[256,8192]{1,0} parameter(0)
  ROOT %fusion = bf16[64,8192]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter
}
"""


@pytest.mark.parametrize(
    ("kept", "kind", "sent"), [(64, "reduce-scatter", 0.75), (128, "all-reduce", 1.5), (256, "all-reduce", 1.5)]
)
def test_a_reduce_scatter_is_written_as_an_all_reduce_of_which_a_part_is_kept(kept, kind, sent):
    (found,) = analyse(SCATTER.replace("64,8192", f"{kept},8192"), 8).collectives
    whole = 256 * 8192 * 2
    assert (found.kind, found.operand_bytes, found.wire_bytes) == (kind, whole, sent * whole)


@pytest.mark.parametrize(
    ("left", "right", "line", "want"),
    [
        ("512,896", "896,128", "bf16[512,128] convolution(%a, %b), dim_labels=bf_io->bf", 512 * 896 * 128),
        # A batch of 2 and 7 heads that share a key: spatial dimensions with holes and padding.
        (
            "512,2,64,1",
            "512,2,7,64",
            "bf16[2,512,512,7] convolution(%a, %b), window={size=2x7 pad=0_0x6_6 lhs_dilate=2x1 rhs_reversal=0x1}, "
            "dim_labels=b0f1_o01i->0bf1",
            2 * 7 * 512 * 512 * 64,
        ),
        ("5,3", "3,4", "f32[5,4] dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}", 60),
    ],
)
def test_matrix_products(left, right, line, want):
    text = f"ENTRY %m (a: f32[1]) -> f32[1] {{\n  %a = f32[{left}]{{0}} parameter(0)\n"
    text += f"  %b = f32[{right}]{{0}} parameter(1)\n  ROOT %c = {line}\n}}\n"
    assert analyse(text, 1).flops == 2 * want


@pytest.mark.parametrize(
    ("text", "group", "spread"),
    [
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", 2, 4),
        ("replica_groups=[2,4]<=[8]", 4, 3),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2, 4),
        ("replica_groups=mesh['x'=2,'y'=4] {'x'}", 2, 4),
        ("replica_groups=mesh['x'=2,'y'=4] {'x','y'}", 8, 7),
        ("replica_groups=mesh['x'=2,'y'=4] {'y':(1)2}", 2, 2),
        ("replica_groups=mesh['x'=2,'y'=4] {'y':(2)2}", 2, 1),
        ("replica_groups=mesh['x'=4,'y'=1,'z'=2], device_ids=([2,4]T(1,0)) {'x'}", 4, 3),
        ("replica_groups=mesh['x'=2,'y'=2], device_ids=(0,3,1,2) {'y'}", 2, 3),
        ("", 8, 7),
    ],
)
def test_groups(text, group, spread):
    code = "ENTRY %m (a: f32[6]) -> f32[6] {\n  %a = f32[6]{0} parameter(0)\n"
    code += f"  ROOT %r = f32[6]{{0}} all-reduce(%a), channel_id=1, {text}, to_apply=%add\n}}\n"
    (found,) = analyse(code, 8).collectives
    assert (found.group, found.spread, found.operand_bytes) == (group, spread, 24)
    assert found.wire_bytes == pytest.approx(2 * 24 * (group - 1) / group)

"""Reading programs, beside what is known of them."""

import jax
import jax.numpy as jnp
import pytest

from launch.plan.hlo import Array, Program, arrays


def test_a_scans_body_counts_as_often_as_it_runs():
    def layers(x, w_LDD):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w_LDD)[0]

    x, w = jax.ShapeDtypeStruct((16, 32), jnp.float32), jax.ShapeDtypeStruct((7, 32, 32), jnp.float32)
    program = Program(jax.jit(layers).lower(x, w).compile().as_text())
    assert sum(o.flops * o.times for o in program.operations()) == 7 * 2 * 16 * 32 * 32
    assert sum(o.flops for o in program.operations(scale=False)) == 2 * 16 * 32 * 32


def test_arrays_say_where_they_are():
    found = arrays("(bf16[64,512]{1,0:T(8,128)(2,1)S(3)}, f32[8]{0:T(128)}, s32[])")
    assert found == [Array("bf16", (64, 512), 3), Array("f32", (8,), 0), Array("s32", (), 0)]
    assert [a.bytes for a in found] == [65_536, 32, 4]


def test_a_matmul_written_as_a_convolution_has_the_same_flops():
    text = """HloModule m

ENTRY %main (a: bf16[16,32], b: bf16[32,64]) -> bf16[16,64] {
  %a = bf16[16,32]{1,0} parameter(0)
  %b = bf16[32,64]{1,0} parameter(1)
  %c = bf16[16,64]{1,0} convolution(%a, %b), dim_labels=bf_io->bf, backend_config={"estimated_cycles":"77"}
}
"""
    *_, operation = Program(text).operations()
    assert operation.flops == 2 * 16 * 32 * 64
    assert operation.instruction.cycles == 77


def test_a_kernel_has_the_flops_that_it_says():
    text = """HloModule m

ENTRY %main (a: bf16[16,32]) -> bf16[16,64] {
  %a = bf16[16,32]{1,0} parameter(0)
  %k = bf16[16,64]{1,0} custom-call(%a), backend_config={"custom_call_config":{"cost_estimate":{"flops":"65536"}}}
}
"""
    assert [o.flops for o in Program(text).operations()] == [0, 65_536]


def test_a_loop_whose_first_iteration_is_peeled_off_runs_once_less():
    text = """HloModule m

%condition (p: (f32[2], s32[])) -> pred[] {
  %p = (f32[2]{0}, s32[]) parameter(0)
  %n = s32[] get-tuple-element(%p), index=1
  %end = s32[] constant(12)
  %less = pred[] compare(%n, %end), direction=LT
}

%body (q: (f32[2], s32[])) -> (f32[2], s32[]) {
  %q = (f32[2]{0}, s32[]) parameter(0)
}

ENTRY %main (a: f32[2]) -> (f32[2], s32[]) {
  %a = f32[2]{0} parameter(0)
  %one = s32[] constant(1)
  %start = s32[] copy(%one)
  %state = (f32[2]{0}, s32[]) tuple(%a, %start)
  %w = (f32[2]{0}, s32[]) while(%state), condition=%condition, body=%body
}
"""
    program = Program(text)
    assert program.trip_count(program.instructions["w"]) == 11


def test_a_loop_without_a_constant_trip_count_is_an_error():
    text = """HloModule m

%condition (p: s32[]) -> pred[] {
  %p = s32[] parameter(0)
}

%body (p: s32[]) -> s32[] {
  %p = s32[] parameter(0)
}

ENTRY %main (a: s32[]) -> s32[] {
  %a = s32[] parameter(0)
  %w = s32[] while(%a), condition=%condition, body=%body
}
"""
    with pytest.raises(ValueError, match="trip count of w"):
        list(Program(text).operations())

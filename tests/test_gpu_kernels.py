"""What benchmarks/gpu_kernels.py counts, by hand, and what it says without NVIDIA's packages."""

import pytest
from jax.experimental import topologies

from benchmarks.gpu_kernels import compile_update, count_kernels
from utils.runs.flags import UsageError

PROGRAM = """HloModule jit_f, is_scheduled=true

%fused (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %negate = f32[4]{0} negate(%p)
}

%body (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %t = (s32[], f32[4]{0}) parameter(0)
  %x = f32[4]{0} get-tuple-element(%t), index=1
  %y = f32[4]{0} fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/while/body/jvp(Encoder)/Conv_0/mul"}
  %start = (f32[4]{0}, f32[4]{0}) all-reduce-start(%y), channel_id=1, to_apply=%fused
  %done = f32[4]{0} all-reduce-done(%start)
  ROOT %out = (s32[], f32[4]{0}) tuple(%i, %done)
}

%condition (t: (s32[], f32[4])) -> pred[] {
  ROOT %less = pred[] fusion(%t), kind=kLoop, calls=%fused
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %loop = (s32[], f32[4]{0}) while(%t), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %again = (s32[], f32[4]{0}) while(%loop), condition=%condition, body=%body
  ROOT %copy = f32[4]{0} copy(%x)
}
"""


def test_what_a_loop_holds_counts_as_often_as_it_runs():
    counted = count_kernels(PROGRAM)
    # a loop that runs three times, whose condition is not evaluated, and one of which that is not known
    assert counted == {"Encoder, Conv_0, forward": 4, "between devices: all-reduce": 4, "(internal to XLA)": 2}


def test_says_which_packages_it_needs(monkeypatch):
    def missing(*args, **kwargs):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(UsageError, match="--extra cuda13"):
        compile_update("ppo", {"env_id": "Breakout-v5"})

# shellcheck shell=bash
# XLA's flags for NVIDIA GPUs, for all launchers: source it. What XLA_FLAGS holds already comes last, and so wins.
# tests/test_launch.py asks the pinned jaxlib whether it knows each of them, and would not do it by itself.

flags=(
  # Weights are gathered over fsdp where a layer uses them: order the program so that this happens under other work.
  --xla_gpu_enable_latency_hiding_scheduler=true
  # Layers are scanned: begin the next one's gather during this one;
  --xla_gpu_enable_pipelined_all_gather=true
  # for that the loop needs two buffers of gathered weights, taken in turn, instead of a copy in each round.
  --xla_gpu_enable_while_loop_double_buffering=true
)
export XLA_FLAGS="${flags[*]}${XLA_FLAGS:+ $XLA_FLAGS}"
unset flags

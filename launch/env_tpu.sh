# shellcheck shell=bash
# libtpu's flags, for all launchers: source it. What LIBTPU_INIT_ARGS holds already comes last, and so wins.
# They are libtpu's own: in XLA_FLAGS jaxlib would refuse them.

flags=(
  # Weights are gathered over fsdp where a layer uses them: do it in steps between the matrix products of other work.
  --xla_tpu_enable_async_collective_fusion=true
  --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
  --xla_tpu_enable_async_collective_fusion_multiple_steps=true
  # The tensor core computes on while a collective is under way.
  --xla_tpu_overlap_compute_collective_tc=true
  --xla_enable_async_all_gather=true
)
export LIBTPU_INIT_ARGS="${flags[*]}${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}"
unset flags

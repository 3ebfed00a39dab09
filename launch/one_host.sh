#!/usr/bin/env bash
# One process that drives every accelerator of this machine (or its CPU):
#   launch/one_host.sh --config=configs/rl.py:qwen2_5_0_5b --config.init_from=DIR --config.mesh.tensor=2
set -euo pipefail
here="$(cd "$(dirname "$0")/.." && pwd)"  # paths in the arguments stay the caller's
[ -x "$here/.venv/bin/python" ] || { echo "error: no .venv in $here; run make install first." >&2; exit 2; }
# Transparent huge pages for malloc: page faults cost a quarter of a step on CPU (see Makefile).
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" exec "$here/.venv/bin/python" -m r3jax.train "$@"

#!/usr/bin/env bash
# N processes on this machine, as one job: launch/local.sh N VERB [flags]
#   launch/local.sh 1 train --config=configs/rl.py:qwen2_5_0_5b --config.init_from=DIR
#   launch/local.sh 2 train --config=configs/rl.py
# With several, each gets its share of the GPUs, or a CPU. SIGTERM and Ctrl-C go to all of them: they save and end with
# 75. The exit code is 75 if that is why they ended, and else the worst of theirs.
set -euo pipefail

count=${1:-}
[[ $count =~ ^[1-9][0-9]*$ && $# -ge 2 ]] || { echo "usage: launch/local.sh N VERB [flags]" >&2; exit 2; }
shift
here=$(cd "$(dirname "$0")/.." && pwd) # paths in the arguments stay the caller's
python=${PYTHON:-$here/.venv/bin/python}
[ -x "$python" ] || { echo "error: no .venv in $here; run make install first." >&2; exit 2; }
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
# Transparent huge pages for malloc: page faults cost a quarter of a step on CPU (see Makefile).
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
case ${CUDA_VISIBLE_DEVICES-all} in
all) gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ' || true) ;;
'' | -1 | NoDevFiles) gpus=0 ;; # hidden
*) gpus=$(tr ',' '\n' <<< "$CUDA_VISIBLE_DEVICES" | grep -c .) ;;
esac
[ "${JAX_PLATFORMS:-}" != cpu ] || gpus=0
if ((gpus)); then
  # shellcheck source=launch/env_gpu.sh
  . "$here/launch/env_gpu.sh"
fi
((count == 1)) && exec "$python" -m r3jax "$@"

((gpus % count == 0)) || {
  echo "error: $gpus GPUs are not shared evenly by $count processes; change N, or set JAX_PLATFORMS=cpu." >&2
  exit 2
}
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$count
each=$((gpus / count))
processes=()
set -m # in groups of their own: a terminal's Ctrl-C is for this script, which asks them to save
trap 'kill -TERM "${processes[@]}" 2>/dev/null || true' TERM INT
for ((rank = 0; rank < count; rank++)); do
  if ((each)); then
    export JAX_LOCAL_DEVICE_IDS
    JAX_LOCAL_DEVICE_IDS=$(seq -s, $((rank * each)) $((rank * each + each - 1)))
  fi
  JAX_PROCESS_ID=$rank "$python" -m r3jax "$@" &
  processes+=($!)
done

worst=0 again=0
for process in "${processes[@]}"; do
  code=0
  wait "$process" || code=$?
  while kill -0 "$process" 2>/dev/null; do # a signal of ours ends a wait early
    code=0
    wait "$process" || code=$?
  done
  if ((code == 75)); then again=75; elif ((code > worst)); then worst=$code; fi
done
exit $((worst ? worst : again))

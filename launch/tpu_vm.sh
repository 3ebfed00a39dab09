#!/usr/bin/env bash
# A TPU slice of Google Cloud, by queued resources:
#   export NAME=r3 ZONE=us-west4-a TYPE=v5litepod-16 RUNTIME=v2-alpha-tpuv5-lite   # and SPOT=1, PROJECT=…
#   launch/tpu_vm.sh create                  asks for the slice and waits until it is there
#   launch/tpu_vm.sh sync                    copies this working tree to every host and installs it
#   launch/tpu_vm.sh run train --config=…    runs a verb on all hosts, and again as long as it ends with 75;
#                                            Ctrl-C and SIGTERM tell all hosts to save and end, and wait for that
#   launch/tpu_vm.sh delete
# The exit code is gcloud's: of `run`, the first that is not 0 among the hosts'.
set -euo pipefail

fail() {
  echo "error: $1" >&2
  exit 2
}

verb=${1:-}
[[ $verb =~ ^(create|sync|run|delete)$ ]] || fail "usage: launch/tpu_vm.sh create|sync|run|delete"
shift
for name in NAME ZONE; do [ -n "${!name:-}" ] || fail "set $name; launch/tpu_vm.sh says how."; done
where=(--zone="$ZONE" ${PROJECT:+--project="$PROJECT"})
here=$(cd "$(dirname "$0")/.." && pwd)

queued() { gcloud compute tpus queued-resources "$@" "${where[@]}"; }
# shellcheck disable=SC2153 # NAME is the environment's
everywhere() { gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all --command="$1"; }

case $verb in
create)
  for name in TYPE RUNTIME; do [ -n "${!name:-}" ] || fail "set $name; launch/tpu_vm.sh says how."; done
  queued create "$NAME" --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$RUNTIME" ${SPOT:+--spot}
  state=
  until [ "$state" = ACTIVE ]; do
    state=$(queued describe "$NAME" --format='value(state.state)')
    echo "$NAME: $state"
    [[ ! $state =~ ^(FAILED|SUSPEND) ]] || exit 1
    [ "$state" = ACTIVE ] || sleep "${POLL:-30}"
  done
  ;;
sync)
  parcel=$(mktemp --suffix=.tgz)
  trap 'rm -f "$parcel"' EXIT
  # What git knows, as it is here now, and what it would add.
  git -C "$here" ls-files --cached --others --exclude-standard -z |
    tar -C "$here" --null --files-from=- --ignore-failed-read -czf "$parcel"
  gcloud compute tpus tpu-vm scp "$parcel" "$NAME:r3jax.tgz" "${where[@]}" --worker=all
  everywhere "mkdir -p r3jax && tar -xzf r3jax.tgz -C r3jax && cd r3jax &&
    { command -v python3.11 || { sudo apt-get update -q && sudo apt-get install -qy python3.11-venv; }; } &&
    { [ -d .venv ] || python3.11 -m venv .venv; } && .venv/bin/pip install -q -r requirements-tpu.txt"
  ;;
run)
  (($#)) || fail "say what: launch/tpu_vm.sh run train --config=configs/rl.py"
  words=$(printf '%q ' "$@")
  code=75 stopped=
  trap 'stopped=1' INT TERM
  while ((code == 75)) && [ -z "$stopped" ]; do
    # A Ctrl-C would end gcloud here, while the hosts go on; as it is, it ends when they have.
    (trap '' INT && everywhere "cd r3jax && exec .venv/bin/python -m r3jax $words") </dev/null &
    told=
    while code=0 && wait "$!" || code=$?; [ -n "$stopped" ] && [ -z "$told" ]; do # a signal ends the wait early
      told=1
      everywhere "pkill -TERM -f '[p]ython -m r3jax' || true"
    done
  done
  exit "$code"
  ;;
delete)
  queued delete "$NAME" --force --quiet
  ;;
esac

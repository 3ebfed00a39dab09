#!/usr/bin/env bash
# A real Slurm of two nodes on this machine, for tests/test_slurm.py. As root, on Debian or Ubuntu:
#   tests/slurm.sh install         slurm-wlm and munge, by apt; n1 and n2 into /etc/hosts
#   tests/slurm.sh start FOLDER    its daemons, with all their files in FOLDER; then export SLURM_CONF=FOLDER/slurm.conf
#   tests/slurm.sh stop FOLDER
set -euo pipefail
verb=${1:-} folder=${2:-}

case $verb in
install)
  apt-get update -q
  DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends slurm-wlm munge
  grep -qw n1 /etc/hosts || echo "127.0.0.1 n1 n2" >> /etc/hosts
  ;;
start)
  mkdir -p "$folder"/{state,n1,n2}
  chmod 755 "$folder"
  dd if=/dev/urandom of="$folder/munge.key" bs=1024 count=1 status=none
  chmod 400 "$folder/munge.key"
  munged --force --socket="$folder/munge.socket" --key-file="$folder/munge.key" --pid-file="$folder/munge.pid" \
    --log-file="$folder/munge.log" --seed-file="$folder/munge.seed"
  host=$(hostname)
  cat > "$folder/slurm.conf" <<CONF
ClusterName=here
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=17817
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=90
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2,bf_interval=2
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=17818 CPUs=1
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=17819 CPUs=1
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=60 State=UP PriorityTier=1 GraceTime=90
PartitionName=urgent Nodes=n1,n2 MaxTime=60 State=UP PriorityTier=2 PreemptMode=OFF
CONF
  export SLURM_CONF=$folder/slurm.conf
  slurmctld -c
  for node in n1 n2; do slurmd -c -N "$node"; done
  for _ in $(seq 100); do
    [ "$(sinfo --noheader --Node --partition=all --format=%t 2>/dev/null | grep -c idle)" != 2 ] || exit 0
    sleep 0.2
  done
  sinfo >&2
  tail -n 5 "$folder"/*.log >&2
  exit 1
  ;;
stop)
  for file in "$folder"/{slurmd.n1,slurmd.n2,slurmctld,munge}.pid; do
    [ -s "$file" ] || continue
    process=$(cat "$file")
    kill "$process" || continue
    while kill -0 "$process" 2>/dev/null; do sleep 0.1; done
  done
  ;;
*)
  echo "usage: tests/slurm.sh install | start FOLDER | stop FOLDER" >&2
  exit 2
  ;;
esac

#!/usr/bin/env bash
# A Slurm cluster of one node, this machine, for as long as a command runs:
#
#     apt-get install slurm-wlm munge        # Debian; then, as root
#     tests/slurm.sh python common/tools/benchmark.py --launcher "srun --partition=main" ...
#
# Controller, node daemon and authentication all live in a folder of their own, which goes with them.
set -euo pipefail
[ $# -gt 0 ] || { echo "error: give the command to run on the cluster" >&2; exit 2; }
[ "$(id -u)" = 0 ] || { echo "error: Slurm's daemons are started as root; be root" >&2; exit 2; }
for program in slurmctld slurmd munged mungekey sbatch; do
    type "$program" >/dev/null 2>&1 || { echo "error: $program is missing: apt-get install slurm-wlm munge" >&2; exit 2; }
done

place=$(mktemp -d)
chmod 755 "$place"
export SLURM_CONF=$place/slurm.conf
daemons=()
end() {
    kill "${daemons[@]}" 2>/dev/null || true
    wait
    rm -rf "$place"
}
trap end EXIT

mungekey --create --keyfile="$place/munge.key"
munged --foreground --force --key-file="$place/munge.key" --socket="$place/munge.socket" \
    --pid-file="$place/munged.pid" --seed-file="$place/munge.seed" >"$place/munged.log" 2>&1 &
daemons+=($!)
mkdir "$place/state" "$place/spool"
cat > "$SLURM_CONF" <<END
ClusterName=one
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$place/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0
StateSaveLocation=$place/state
SlurmdSpoolDir=$place/spool
SlurmctldPidFile=$place/slurmctld.pid
SlurmdPidFile=$place/slurmd.pid
SlurmctldLogFile=$place/slurmctld.log
SlurmdLogFile=$place/slurmd.log
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
for daemon in slurmctld slurmd; do
    "$daemon" -D >/dev/null 2>&1 &
    daemons+=($!)
done
for _ in $(seq 60); do
    [ "$(sinfo --noheader --format=%t 2>/dev/null)" != idle ] || break
    sleep 0.5
done
"$@"

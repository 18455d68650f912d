#!/usr/bin/env bash
# A Slurm cluster inside namespaces that cluster.py made: a bridge, munged, slurmctld, and N nodes, each in network, pid,
# host name and mount namespaces of its own. This script is the first process in there: when it ends, everything does.
#   cluster.sh WORK N         the cluster
#   cluster.sh WORK node K    one node of it
set -euo pipefail

work=$1
export SLURM_CONF=$work/etc/slurm.conf
mount --bind "$work/etc/hosts" /etc/hosts

if [ "$2" = node ]; then
    hostname "node$3"
    until ip link show eth0; do sleep 0.02; done >/dev/null 2>&1 # the other end of the cable
    ip link set lo up
    ip addr add "10.77.0.$3/24" dev eth0
    ip link set eth0 up
    slurmd -D &
    wait
    exit
fi

hostname control
ip link set lo up
ip link add bridge0 type bridge
ip addr add 10.77.0.254/24 dev bridge0
ip link set bridge0 up

munged --foreground --socket="$work/run/munge.socket" --key-file="$work/etc/munge.key" \
    --pid-file="$work/run/munged.pid" --log-file="$work/log/munged.log" --seed-file="$work/run/munged.seed" &
until [ -S "$work/run/munge.socket" ]; do sleep 0.02; done
slurmctld -D &

for ((k = 1; k <= $2; k++)); do
    unshare --net --pid --uts --mount --fork --kill-child --mount-proc "$0" "$work" node "$k" &
    node=$!
    while [ "$(readlink "/proc/$node/ns/net")" = "$(readlink /proc/self/ns/net)" ]; do sleep 0.02; done
    ip link add "cable$k" type veth peer name eth0 netns "$node"
    ip link set "cable$k" master bridge0 up
done
wait

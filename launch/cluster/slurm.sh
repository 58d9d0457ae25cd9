# shellcheck shell=bash disable=SC2154
# The second half of every script that `quatuor slurm` writes. The first half sets:
#   bin         folder of the programs quatuor, ray and python, the same on every node
#   command     arguments of quatuor: kind, recipe, overrides
#   folder      the run folder; like the recipe and its data, on a file system that all nodes share
#   least_cpus  logical CPUs a node must offer, however few cores it has, for all processes to find room

set -euo pipefail

start_seconds=600 # how long the nodes have to join
# Slurm kills everything 30 s (KillWait) after its SIGTERM, if no site has changed that: all this fits in.
step_seconds=15 # how long the driver has after SIGTERM to finish its step and save a checkpoint
stop_seconds=6  # how long it has after a second SIGTERM, and what else runs after its only one, before SIGKILL

port=$((20000 + SLURM_JOB_ID % 5000 * 2)) # even, one per job and below the ports the system hands out; +1 is Ray's too
temp=/tmp/quatuor-$SLURM_JOB_ID           # short, because Ray keeps sockets there, whose paths are limited to 107 bytes
name=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
first=$SLURMD_NODENAME # this script runs there, and so do Ray's head and the driver
export bin least_cpus temp PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0
unset RAY_ADDRESS
# A token of the job's own: without one, anybody that reaches the port could run code in this user's name.
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token
declare -A steps=() # node -> process id of the srun that holds its Ray
awaited= # process id of what the script waits for
driver=
leaving= # SIGUSR1 has come
stopped= # SIGTERM has come

say() {
    echo "$(date +%T) slurm job $name: $*"
}

die() {
    say "$*" >&2
    exit 1
}

alive() {
    kill -0 "$1" 2>/dev/null
}

# What runs on a node, inside its own step: Ray with the CPUs and GPUs that Slurm gave, until the step is ended.
start_ray() {
    local cpus=$((SLURM_CPUS_ON_NODE > least_cpus ? SLURM_CPUS_ON_NODE : least_cpus))
    exec "$bin/ray" start --block "$@" --num-cpus="$cpus" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --temp-dir="$temp" \
        --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0
}
export -f start_ray

start_node() { # NODE, options of ray start
    say "starting Ray on $1 ($2)"
    srun --nodes=1 --ntasks=1 --nodelist="$1" --overlap --cpu-bind=none --input=none \
        bash -c "start_ray ${*:2}" >"$folder.ray-$name-$1.log" 2>&1 &
    steps[$1]=$!
}

# Wait for a process and return its exit code; a Ray node that ends before it is the end of the job. Polls, because
# `wait -n` of older bashes misses a process that ended just before.
await() {
    local node
    awaited=$1
    while alive "$1"; do
        for node in "${!steps[@]}"; do
            alive "${steps[$node]}" || lost "$node"
        done
        if [ -n "$leaving" ] && [ "$1" = "$driver" ]; then
            kill -USR1 "$1" 2>/dev/null || true # again and again: it hears nothing before Python has started
        fi
        sleep 1
    done
    wait "$1"
}

lost() {
    tail -n 15 "$folder.ray-$name-$1.log" >&2
    die "Ray on $1 ended (above: the end of $folder.ray-$name-$1.log; more in $temp on that node)"
}

wait_for_nodes() { # COUNT
    "$bin/python" -P -m launch.cluster.slurm "$address" "$1" "$start_seconds" &
    await $! || die "the Ray cluster did not come up"
}

ends() { # SECONDS, process ids: ask them to end, and wait so long; false when one is left
    local waited pid
    kill -TERM "${@:2}" 2>/dev/null || return 0
    for ((waited = 0; waited < $1; waited++)); do
        for pid in "${@:2}"; do
            if alive "$pid"; then
                sleep 1
                continue 2
            fi
        done
        return 0
    done
    return 1
}

end() { # process ids: ask them to end, wait, then kill what is left
    ends "$stop_seconds" "$@" || kill -KILL "$@" 2>/dev/null || true
}

# Whether Slurm still lets the job run: one that it is ending would come back, cancelled or not.
running() {
    [[ $(scontrol show job "$SLURM_JOB_ID" 2>/dev/null) == *JobState=RUNNING* ]]
}

# However the script ends: first what it waits for, most often the driver, then every node's Ray. Slurm ends whatever
# the steps might have left.
finish() {
    local code=$?
    trap '' USR1 TERM INT
    trap - EXIT
    if [ -n "$awaited" ]; then ends "$step_seconds" "$awaited" || end "$awaited"; fi
    if [ -n "$stopped" ] && [ -n "$driver" ]; then
        code=0
        wait "$driver" || code=$? # its own: it may have saved a checkpoint
    fi
    end "${steps[@]}"
    if [ "$code" = 0 ] || [ "$code" = 75 ]; then
        timeout 60 srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --overlap rm -rf "$temp" </dev/null || true
        for node in "${!steps[@]}"; do rm -f "$folder.ray-$name-$node.log"; done
    fi
    if [ "$code" = 75 ] && [ -z "$leaving" ] && ! running; then
        say "left with a checkpoint; Slurm ends the job: submit this script once more to go on"
    elif [ "$code" = 75 ]; then
        say "left with a checkpoint; queueing the job again"
        scontrol requeue "$SLURM_JOB_ID" || say "it could not be queued again: submit this script once more to go on" >&2
    fi
    exit "$code"
}

trap finish EXIT
trap 'stopped=yes; exit 143' TERM INT
trap 'leaving=yes; say "SIGUSR1: the run will finish its step, save a checkpoint and end"' USR1

say "$SLURM_JOB_NUM_NODES nodes: $SLURM_JOB_NODELIST"
address=$("$bin/python" -c 'import ray; print(ray.util.get_node_ip_address())'):$port
start_node "$first" --head --port="$port" --ray-client-server-port="$((port + 1))" --include-dashboard=false
wait_for_nodes 1
for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    if [ "$node" != "$first" ]; then start_node "$node" --address="$address"; fi
done
wait_for_nodes "$SLURM_JOB_NUM_NODES"

if [ -n "$(find "$folder/checkpoints" -maxdepth 1 -type d -regex '.*/step-[0-9]+' -print -quit 2>/dev/null)" ]; then
    command+=(--resume)
elif [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ -e "$folder" ]; then
    say "the try before this one left no checkpoint; its folder is now $folder.before-$name"
    mv "$folder" "$folder.before-$name"
fi
say "all nodes are there; quatuor ${command[*]}"
(trap '' USR1 && exec "$bin/quatuor" "${command[@]}" cluster.address="$address") &
driver=$!
await "$driver"

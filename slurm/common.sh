# shellcheck shell=bash
# What every batch script here shares; sourced on the first node of a job.
#
#   source "$MOEPP_ROOT/slurm/common.sh"
#   moepp_job CONFIG [section.key=value ...]
#
# A script sets, before sourcing, what it does not want to be the default:
#   MOEPP_ROOT                the repository
#   MOEPP_COMMAND             array: how to call moepp
#   MOEPP_RANKS_PER_NODE      ranks a node (default: its GPUs, or 1)
#   MOEPP_MAX_RESTARTS        how often ranks start anew inside the job
#   MOEPP_RESTART_TIMEOUT     seconds that nodes wait inside the job for a node whose ranks have died
#   MOEPP_MAX_REQUEUES        how often the job may start again
#   MOEPP_REQUEUE_ON_FAILURE  1: also after a failure with a traceback
#   MOEPP_PREFLIGHT           array: command that fails on a sick node; empty for none
#   MOEPP_CONTAINER           none, pyxis or apptainer, with MOEPP_CONTAINER_IMAGE and the array
#                             MOEPP_CONTAINER_MOUNTS
#   MOEPP_LOG_DIR             folder on each node for the ranks' own output
#   MOEPP_STEP_WAIT           seconds that nodes get to end after the first one has ended
#   MOEPP_RESUME_COMMAND               exported: the command that submits the job again
#   MOEPP_SIGNAL_BEFORE       seconds before the time limit at which sbatch's --signal asks the run to stop
#   MOEPP_PROBE_TIMEOUT       seconds that nodes get to answer after a failure

# Exit statuses of moepp.
_MOEPP_USAGE=2 _MOEPP_UNFIT=3 _MOEPP_HUNG=70 _MOEPP_LOST=71 _MOEPP_STOPPED=75

: "${MOEPP_MAX_RESTARTS:=3}" "${MOEPP_MAX_REQUEUES:=20}" "${MOEPP_REQUEUE_ON_FAILURE:=0}"
: "${MOEPP_CONTAINER:=none}" "${MOEPP_CONTAINER_IMAGE:=}"
: "${MOEPP_PROBE_TIMEOUT:=120}" "${MOEPP_RESTART_TIMEOUT:=120}"
# Not above the restart's: nodes that are left when one has failed for good end before they give it up.
: "${MOEPP_STEP_WAIT:=$((MOEPP_RESTART_TIMEOUT < 60 ? MOEPP_RESTART_TIMEOUT : 60))}"
: "${MOEPP_RANKS_PER_NODE:=${SLURM_GPUS_ON_NODE:-1}}"
# The user's own, which moepp makes and verifies (runtime/rank_environment.py, make_log_dir).
: "${MOEPP_LOG_DIR:=${TMPDIR:-/tmp}/moepp-logs-$UID}"
# A job that was submitted with --export would hand its steps no more than the job was given, and with
# NONE not even a PATH.
export SLURM_EXPORT_ENV=ALL
if [[ -z ${MOEPP_COMMAND[*]:-} ]]; then
    MOEPP_COMMAND=(moepp)
    # Where launch/env.sh makes it.
    _moepp_venv=${MOEPP_VENV:-$MOEPP_ROOT/.venv${MOEPP_PAIR:+-$MOEPP_PAIR}}
    if [[ $MOEPP_CONTAINER == none && -z ${MOEPP_ENV:-} && -x $_moepp_venv/bin/moepp ]]; then
        MOEPP_COMMAND=("$_moepp_venv/bin/moepp")
    fi
fi
[[ -v MOEPP_PREFLIGHT ]] || declare -a MOEPP_PREFLIGHT=()
[[ -v MOEPP_CONTAINER_MOUNTS ]] || declare -a MOEPP_CONTAINER_MOUNTS=()

_MOEPP_RESTART=${SLURM_RESTART_COUNT:-0}
# This job's name for scontrol. One element of an array has the number of the whole array, which would
# be asked about, and requeued, in its place.
_MOEPP_JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
: "${_MOEPP_JOB:=$SLURM_JOB_ID}"
_moepp_stopping=0    # asked to stop
_moepp_interrupted=0 # since the last wait began

_moepp_say() { printf 'moepp job %s: %s\n' "$SLURM_JOB_ID" "$*" >&2; }

# ---- running something on the nodes ------------------------------------------------------

# Asks the run to save and stop. One rank is enough, all agree after each step; so the request goes to
# the launcher on this node and to nothing else: a signal to the whole step would also reach the
# ranks' own helper processes, which it ends.
_moepp_stop() {
    local pid found=0
    _moepp_stopping=1 _moepp_interrupted=1
    _moepp_say "asked to stop; the run saves after its step"
    # Columns: pid, job, step, local task, global task. Tasks have a number, their children none.
    while read -r pid; do
        kill -USR1 "$pid" 2>/dev/null && found=1
    done < <(scontrol listpids "$SLURM_JOB_ID" "$SLURMD_NODENAME" 2>/dev/null |
        awk '$3 ~ /^[0-9]+$/ && $4 == 0 { print $1 }')
    if ((!found)) && [[ -n ${_moepp_srun:-} ]]; then
        kill -USR1 "$_moepp_srun" 2>/dev/null || true
    fi
}

# Runs "$@" once on each of the first $1 nodes, waits, and returns the highest status. Signals to
# this script are dealt with meanwhile.
_moepp_on_nodes() {
    local nodes=$1 status=0 last=0 waited=0 mount
    local -a runtime=()
    shift
    case $MOEPP_CONTAINER in
    pyxis)
        local mounts=$PWD:$PWD
        for mount in "${MOEPP_CONTAINER_MOUNTS[@]}"; do mounts+=,$mount; done
        set -- --container-image="$MOEPP_CONTAINER_IMAGE" --container-mounts="$mounts" \
            --container-workdir="$PWD" "$@"
        ;;
    apptainer)
        runtime=(apptainer exec --nv --pwd "$PWD" --bind "$PWD")
        for mount in "${MOEPP_CONTAINER_MOUNTS[@]}"; do runtime+=(--bind "$mount"); done
        set -- "${runtime[@]}" "$MOEPP_CONTAINER_IMAGE" "$@"
        ;;
    esac
    # No binding: the launcher's ranks share out the node's cores. Ended nodes are given time, not
    # killed at once: the first to leave after a save must not end the last.
    srun --nodes="$nodes" --relative=0 --ntasks="$nodes" --ntasks-per-node=1 --cpu-bind=none \
        --kill-on-bad-exit=0 --wait="$MOEPP_STEP_WAIT" "$@" &
    _moepp_srun=$!
    while :; do
        _moepp_interrupted=0
        last=0
        wait "$_moepp_srun" || last=$?
        # The signal came when it had been waited for already: bash knows it no longer.
        if ((waited && last == 127)); then break; fi
        status=$last waited=1
        ((_moepp_interrupted)) || break
    done
    _moepp_srun=
    return "$status"
}

# Uses up the numbers of the steps that earlier starts of this job had: preflight, training and a look
# for lost nodes. Slurm numbers steps anew in each start, and a signal that it could not deliver to a
# lost node reaches the step of the same number when the node is back.
_moepp_leave_old_step_numbers() {
    local step
    for ((step = 0; step < 3 * _MOEPP_RESTART; step++)); do
        timeout "$MOEPP_PROBE_TIMEOUT" srun --nodes=1 --ntasks=1 --relative=0 true || true
    done
}

# Runs a moepp command that starts ranks once on each of the first $1 nodes, with the options by which
# the nodes find each other: _moepp_launch NODES COMMAND [OPTION ...] [-- ARGUMENT ...]
_moepp_launch() {
    local nodes=$1 head port
    local -a command=("${MOEPP_COMMAND[@]}")
    shift
    while (($#)) && [[ $1 != -- ]]; do
        command+=("$1")
        shift
    done
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # The node's address as Slurm itself uses it: a node's name need not be one.
    head=$(scontrol show node --oneliner "$head" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
    if ((nodes > 1)); then
        # A port of the job's own, so that two jobs that share a node do not meet, and none of those
        # that Linux hands out to connections (from 32768 on).
        port=$((20000 + SLURM_JOB_ID % 12000))
        # Another program of this node, the job's first, may listen there (state 0A).
        while grep -qsE "^ *[0-9]+: [0-9A-F]+:$(printf %04X "$port") [0-9A-F:]+ 0A " /proc/net/tcp /proc/net/tcp6; do
            port=$((port + 1))
        done
        if [[ $head == *:* ]]; then head="[$head]"; fi # IPv6
        command+=(--nnodes "$nodes" --rdzv-id "$SLURM_JOB_ID.$_MOEPP_RESTART.$SECONDS"
            --rdzv-endpoint "$head:$port")
    fi
    # The node's number is known on the node only.
    # shellcheck disable=SC2016
    _moepp_on_nodes "$nodes" bash -c \
        'n=$1; shift; exec "${@:1:n}" --node-rank "$SLURM_NODEID" "${@:n+1}"' \
        moepp "${#command[@]}" "${command[@]}" "$@"
}

# Refuses a job that would be asked to stop as soon as it starts, each time.
_moepp_check_time_limit() {
    local limit
    # Slurm before 22.05 does not say.
    limit=$((${SLURM_JOB_END_TIME:-0} - ${SLURM_JOB_START_TIME:-0}))
    if ((limit > 0 && limit <= ${MOEPP_SIGNAL_BEFORE:-0})); then
        _moepp_say "the time limit ($limit s) must be above the $MOEPP_SIGNAL_BEFORE s before it at which" \
            "the run is asked to stop; lower slurm.signal_before_s (with slurm/train.sbatch, sbatch" \
            "--signal=B:USR1@SECONDS and MOEPP_SIGNAL_BEFORE), or raise the limit"
        exit "$_MOEPP_USAGE"
    fi
}

# Trains on the first $1 nodes: _moepp_train NODES CONFIG [section.key=value ...]
_moepp_train() {
    local nodes=$1
    shift
    _moepp_launch "$nodes" train --resume --nproc "$MOEPP_RANKS_PER_NODE" \
        --max-restarts "$MOEPP_MAX_RESTARTS" --restart-timeout "$MOEPP_RESTART_TIMEOUT" \
        --log-dir "$MOEPP_LOG_DIR/$SLURM_JOB_ID.$_MOEPP_RESTART.$SECONDS" -- "$@"
}

# ---- before and after --------------------------------------------------------------------

# Runs MOEPP_PREFLIGHT on every node. Nodes that fail it are excluded and the job is requeued.
moepp_preflight() {
    local report node status
    local -A statuses=()
    local -a sick=()
    if ((${#MOEPP_PREFLIGHT[@]} == 0)); then return 0; fi
    report=$(mktemp)
    # shellcheck disable=SC2016
    _moepp_on_nodes "$SLURM_JOB_NUM_NODES" bash -c '
        output=$("$@" 2>&1) && status=0 || status=$?
        while IFS= read -r line; do printf "%s: %s\n" "$SLURMD_NODENAME" "$line"; done <<<"$output"
        printf "moepp-preflight %s %d\n" "$SLURMD_NODENAME" "$status"
    ' preflight "${MOEPP_PREFLIGHT[@]}" >"$report" || true
    while read -r _ node status; do
        statuses[$node]=$status
    done < <(grep '^moepp-preflight [^ ]* [0-9]*$' "$report" || true)
    grep -v '^moepp-preflight ' "$report" >&2 || true
    rm -f -- "$report"
    if ((_moepp_stopping)); then _moepp_requeue "asked to stop before training"; fi
    for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
        status=${statuses[$node]:-none}
        case $status in
        0) ;;
        "$_MOEPP_USAGE" | 126 | 127)
            _moepp_say "the preflight command itself is wrong (exit $status on $node); not started"
            exit "$_MOEPP_USAGE"
            ;;
        *)
            _moepp_say "preflight failed on $node (exit $status); see its lines above"
            sick+=("$node")
            ;;
        esac
    done
    if ((${#sick[@]} == 0)); then return 0; fi
    if ((${#sick[@]} == SLURM_JOB_NUM_NODES)); then
        _moepp_say "every node fails: likelier one cause than ${#sick[@]}; not started, not requeued"
        exit "$_MOEPP_UNFIT"
    fi
    _moepp_requeue_without "${sick[@]}"
}

# Whether a node of the job does not answer. When one dies, ranks on the others fail within seconds, and
# Slurm itself notices only after its SlurmdTimeout, by default five minutes.
_moepp_lost_a_node() {
    ! timeout "$MOEPP_PROBE_TIMEOUT" srun --nodes="$SLURM_JOB_NUM_NODES" \
        --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 true
}

# Ends this script; the job starts again without the nodes "$@".
_moepp_requeue_without() {
    local nodes=$* excluded
    nodes=${nodes// /,}
    _moepp_may_requeue "nodes $nodes failed preflight" || _moepp_not_again "$_MOEPP_UNFIT"
    _moepp_say "not started; requeued without $nodes"
    # Slurm takes a list of nodes to avoid for pending jobs only, and ends this script meanwhile.
    trap '' TERM USR1
    scontrol requeuehold "$_MOEPP_JOB" || _moepp_not_again "$_MOEPP_UNFIT"
    excluded=$(scontrol show job --oneliner "$_MOEPP_JOB" |
        sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p')
    if [[ -n $excluded && $excluded != '(null)' ]]; then nodes=$excluded,$nodes; fi
    scontrol update JobId="$_MOEPP_JOB" ExcNodeList="$nodes"
    scontrol release "$_MOEPP_JOB"
    exit "$_MOEPP_UNFIT"
}

_moepp_may_requeue() {
    local state
    if ((_MOEPP_RESTART >= MOEPP_MAX_REQUEUES)); then
        _moepp_say "$1; requeued $_MOEPP_RESTART times already, the most allowed: not again"
        return 1
    fi
    # Slurm would also bring back a job that its user has cancelled.
    state=$(scontrol show job --oneliner "$_MOEPP_JOB" | sed -n 's/.* JobState=\([^ ]*\).*/\1/p')
    if [[ $state != RUNNING && $state != TIMEOUT ]]; then
        _moepp_say "$1; the job is $state, so Slurm decides what happens"
        return 1
    fi
}

# Requeues for reason $1 and ends this script.
_moepp_requeue() {
    _moepp_may_requeue "$1" || _moepp_not_again "$_MOEPP_STOPPED"
    _moepp_say "$1; requeued ($((_MOEPP_RESTART + 1)) of at most $MOEPP_MAX_REQUEUES times)"
    trap '' TERM USR1
    scontrol requeue "$_MOEPP_JOB" || _moepp_not_again "$_MOEPP_STOPPED"
    exit "$_MOEPP_STOPPED"
}

# Ends this script with status $1 where the job does not start again by itself.
_moepp_not_again() {
    if [[ -n ${MOEPP_RESUME_COMMAND:-} ]]; then _moepp_say "not requeued; to resume: $MOEPP_RESUME_COMMAND"; fi
    exit "$1"
}

# What follows from the status $1 of the training.
_moepp_after() {
    local status=$1
    # Ended by the request itself, before it could listen: nothing was done, nothing is lost.
    if ((_moepp_stopping && status == 128 + 10)); then status=$_MOEPP_STOPPED; fi
    case $status in
    0) _moepp_say 'done' ;;
    "$_MOEPP_STOPPED") _moepp_requeue 'stopped on request and saved' ;;
    "$_MOEPP_HUNG") _moepp_requeue 'the run hung (see hangs/ in its folder)' ;;
    "$_MOEPP_LOST")
        _moepp_requeue "a node did not come back within $MOEPP_RESTART_TIMEOUT s after a failure"
        ;;
    "$_MOEPP_USAGE" | "$_MOEPP_UNFIT") exit "$status" ;;
    *)
        if _moepp_lost_a_node; then _moepp_requeue "status $status; a node does not answer"; fi
        _moepp_say "failed with status $status; each rank's output: $MOEPP_LOG_DIR/$SLURM_JOB_ID.* on its node"
        if ((MOEPP_REQUEUE_ON_FAILURE)); then _moepp_requeue "failed with status $status"; fi
        exit "$status"
        ;;
    esac
}

# The whole job: preflight, training on all nodes, and what its end asks for.
moepp_job() {
    local status=0
    _moepp_say "start $((_MOEPP_RESTART + 1)) on $SLURM_JOB_NODELIST," \
        "$SLURM_JOB_NUM_NODES nodes * $MOEPP_RANKS_PER_NODE ranks"
    _moepp_check_time_limit
    trap _moepp_stop USR1 TERM
    _moepp_leave_old_step_numbers
    moepp_preflight
    _moepp_train "$SLURM_JOB_NUM_NODES" "$@" || status=$?
    _moepp_after "$status"
}

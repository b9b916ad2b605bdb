# What the batch scripts share; sourced by them. Runs in the folder that sbatch was called in.
#
# RUN_DIR            run folder; by default runs/JOBNAME-JOBID. Name an older one to continue it.
# ERNIESEARCH_ROOT   the checkout; by default the folder that sbatch was called in.
# MAX_FAILURES       how often a run that fails is put back in the queue (3). Time limits and
#                    preemptions do not count.
set -uo pipefail

stopped=0 child=
# Slurm's warning (--signal) and its SIGTERM: hand it on, and requeue when the command has ended.
trap 'stopped=1; [ -z "$child" ] || kill -USR1 "$child" 2>/dev/null' USR1 TERM

root=${ERNIESEARCH_ROOT:-$SLURM_SUBMIT_DIR}
run_dir=${RUN_DIR:-runs/$SLURM_JOB_NAME-$SLURM_JOB_ID}

# EDIT: what makes `erniesearch` a command on every node (module load …, conda activate …).
# shellcheck disable=SC1091
[ ! -f "$root/.venv/bin/activate" ] || . "$root/.venv/bin/activate"

# EDIT: on several nodes NCCL may need to be told its network, e.g. export NCCL_SOCKET_IFNAME=ib0
export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}} TOKENIZERS_PARALLELISM=false
# srun does not take --cpus-per-task from sbatch (Slurm 22.05 and newer).
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

# record [CONFIG OPTIONS…]: the code and the resolved configuration of this start.
record() {
    record_dir=$run_dir/code/job-$SLURM_JOB_ID-start-${SLURM_RESTART_COUNT:-0}
    mkdir -p "$record_dir" || exit 2
    echo "job $SLURM_JOB_NAME $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}," \
        "nodes $SLURM_JOB_NODELIST, run folder $run_dir"
    if git -C "$root" rev-parse HEAD >"$record_dir/commit" 2>/dev/null; then
        git -C "$root" diff HEAD >"$record_dir/changes.diff"
        git -C "$root" status --short >"$record_dir/status"
    else
        rm "$record_dir/commit"
        echo "$root is no git checkout: only the configuration is recorded"
    fi
    if [ $# -gt 0 ]; then
        # Also the place where a mistake in the configuration is told, once and not by every rank.
        erniesearch train --config "$@" --run_dir "$run_dir" --print_config \
            >"$record_dir/config.yaml" || exit 2
    fi
}

# requeue REASON: once more with the same job number, unless Slurm has taken the job off itself.
requeue() {
    if scontrol show job --oneliner "$SLURM_JOB_ID" | grep -q 'JobState=RUNNING '; then
        echo "$1: back to the queue"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit 75
}

# run COMMAND…: to its end; requeues the job where that helps.
run() {
    "$@" &
    child=$!
    [ "$stopped" = 0 ] || kill -USR1 "$child"
    wait "$child"
    status=$?
    while kill -0 "$child" 2>/dev/null; do  # a signal ends a wait early
        wait "$child"
        status=$?
    done
    [ "$status" != 0 ] || exit 0
    [ "$status" != 75 ] && [ "$stopped" = 0 ] || requeue "stopped on request"
    [ "$status" != 2 ] || exit 2  # a mistake in the input stays one
    # A dead node, a full disk, a bug: the first may be gone next time.
    echo "$(date) job $SLURM_JOB_ID start ${SLURM_RESTART_COUNT:-0} status $status" \
        >>"$run_dir/failures"
    [ "$(wc -l <"$run_dir/failures")" -gt "${MAX_FAILURES:-3}" ] || requeue "failed ($status)"
    exit "$status"
}

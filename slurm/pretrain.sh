# shellcheck shell=bash
# One attempt of a training run; afterwards the job is finished, abandoned, or put back into the queue.
# Sourced by pretrain.sbatch and sweep.sbatch after job.sh.
: "${home:?the repository}"

REQUEUE=75 # exit code of restart.py: this job is to run again

# pretrain RUN MAX_RESTARTS ARGUMENTS-OF-pretrain_dlm.py...; ends the batch script.
pretrain() {
  run=$1 max_restarts=$2
  shift 2
  job=$SLURM_JOB_ID attempt=${SLURM_RESTART_COUNT:-0} must_end=0
  MEGADIFF_JOB=$(array_task)
  export MEGADIFF_JOB
  # The handler only sets a flag; the flag is read when srun has ended or `wait` is interrupted.
  trap 'must_end=1' TERM
  trap '' USR2
  mkdir -p "$run/slurm"
  log=$run/slurm/$MEGADIFF_JOB.$attempt
  describe_allocation
  echo "$(date '+%F %T') attempt $attempt of job $MEGADIFF_JOB on $SLURM_JOB_NODELIST: $SLURM_NNODES nodes," \
    "$MEGADIFF_RANKS_PER_NODE ranks each; logs $log.node*.log"
  restart begin || exit
  if [ "$attempt" -eq 0 ]; then preflight "$@"; fi
  train "$@"
  restart decide
  finish "$?"
}

# Exports the facts about the allocation that the ranks need.
describe_allocation() {
  MEGADIFF_RANKS_PER_NODE=${MEGADIFF_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
  if [ -z "$MEGADIFF_RANKS_PER_NODE" ]; then
    echo "error: this job has no GPUs, so MEGADIFF_RANKS_PER_NODE in slurm/site.env must say how many CPU ranks a" \
      "node runs" >&2
    exit 2
  fi
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  # Each attempt uses another port, because the previous one may still be in use.
  MASTER_PORT=$((15000 + (job * 7 + attempt) % 10000))
  # Slurm sets this only from 23.02 on; with it the trainer stops in time even if no signal arrives.
  if [ -z "${SLURM_JOB_END_TIME:-}" ]; then
    SLURM_JOB_END_TIME=$(date -d "$(squeue -h -j "$MEGADIFF_JOB" -o %e)" +%s 2>/dev/null)
  fi
  if [ -n "$SLURM_JOB_END_TIME" ]; then export SLURM_JOB_END_TIME; else unset SLURM_JOB_END_TIME; fi
  export MEGADIFF_RANKS_PER_NODE MASTER_ADDR MASTER_PORT
}

restart() { "$MEGADIFF_HOST_PYTHON" "$home/slurm/restart.py" "$1" "$run" "$max_restarts"; }

# Checks the run before all nodes are started. Only a user's mistake (2) is final: any other failure may have nothing to
# do with the run and is treated like a crash. Restarts skip this check: its findings were fine before, the ranks check
# them too, and every node would have to wait for it.
preflight() {
  local code
  on_batch_host "$MEGADIFF_PYTHON" "$home/pretrain_dlm.py" "$@" \
    --check --ranks "$((SLURM_NNODES * MEGADIFF_RANKS_PER_NODE))" >"$log.preflight.log" 2>&1
  code=$?
  if [ "$code" -eq 0 ]; then return; fi
  cat "$log.preflight.log" >&2
  if [ "$code" -eq 2 ]; then
    echo "the check before the start refused this run; it will not be restarted"
    exit 2
  fi
  echo "the check before the start ended with $code"
  restart decide
  finish "$?"
}

# Trains on all nodes; returns when srun does. The exit code is of no use, since torchrun's is 1 for any failure.
train() {
  srun --kill-on-bad-exit=1 "${MEGADIFF_SRUN[@]+"${MEGADIFF_SRUN[@]}"}" \
    "${MEGADIFF_CONTAINER[@]+"${MEGADIFF_CONTAINER[@]}"}" bash "$home/slurm/node.sh" "$home" "$log" "$@" &
  local srun=$! requeued=0 timer
  while kill -0 "$srun" 2>/dev/null; do
    sleep 20 &
    timer=$!
    wait -n "$srun" "$timer"
    kill "$timer" 2>/dev/null
    # Past the time limit Slurm kills this shell too, some seconds after TERM, possibly before srun returns.
    if [ "$must_end" -eq 1 ]; then
      must_end=0
      restart timed-out
      if [ "$?" -eq "$REQUEUE" ] && requeue; then requeued=1; fi
    fi
    # srun waits forever for a node that lost its steps and came back before the scheduler noticed its absence.
    restart lingers
    if [ "$?" -eq "$REQUEUE" ]; then
      kill -KILL "$srun"
      break
    fi
  done
  echo "$(date '+%F %T') all nodes have ended"
  if [ "$requeued" -eq 1 ]; then exit 0; fi
}

requeue() { scontrol requeue "$MEGADIFF_JOB"; }

# Ends the batch script with a code, or puts the job back into the queue. Within the grace time of a preemption nobody
# else would: Slurm considers a job that ends by itself then as completed.
finish() {
  if [ "$1" -ne "$REQUEUE" ]; then exit "$1"; fi
  put_back "$MEGADIFF_JOB"
}

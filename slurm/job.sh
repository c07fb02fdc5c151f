# shellcheck shell=bash
# First part of every job, sourced by the batch scripts with $home set to the repository.
#
# A user's input never becomes shell text: it arrives as arguments of the batch script, or as NUL-terminated fields of a
# file, and is passed on as "$@".
: "${home:?the repository}"

# Reads slurm/site.env if there is one. Afterwards these are set:
#   MEGADIFF_PYTHON        python for the trainer and the tools, inside the container if there is one
#   MEGADIFF_HOST_PYTHON   python of the batch host, only for restart.py; it needs no packages
#   MEGADIFF_CONTAINER     array put before each command, such as (apptainer exec --nv image.sif)
#   MEGADIFF_SRUN          array of options for srun, such as (--container-image=...)
load_site() {
  MEGADIFF_CONTAINER=()
  MEGADIFF_SRUN=()
  if [ -e "$home/slurm/site.env" ]; then
    set +u # module files and activation scripts often read unset variables
    # shellcheck source=/dev/null
    . "$home/slurm/site.env"
    set -u
  fi
  if [ -z "${MEGADIFF_PYTHON:-}" ]; then
    MEGADIFF_PYTHON=python3
    if [ -x "$home/.venv/bin/python" ]; then MEGADIFF_PYTHON=$home/.venv/bin/python; fi
  fi
  MEGADIFF_HOST_PYTHON=${MEGADIFF_HOST_PYTHON:-python3}
  # Since Slurm 22.05 srun no longer inherits this from the job.
  if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
  export MEGADIFF_PYTHON MEGADIFF_HOST_PYTHON PYTHONUNBUFFERED=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
}

# Runs one command on the batch host, in the container if the site has one. It ignores the stop signal.
on_batch_host() {
  # shellcheck disable=SC2016  # "$@" belongs to the inner shell
  # Without --overlap the next step would wait until the scheduler has removed this one.
  srun --nodes=1 --ntasks=1 --relative=0 --overlap "${MEGADIFF_SRUN[@]+"${MEGADIFF_SRUN[@]}"}" \
    "${MEGADIFF_CONTAINER[@]+"${MEGADIFF_CONTAINER[@]}"}" bash -c 'trap "" USR2; exec "$@"' on_batch_host "$@"
}

# Reads this array task's fields, written by slurm/submit, into the array `task`.
read_task() {
  mapfile -d '' -t task <"$1/task-$SLURM_ARRAY_TASK_ID.args"
  if [ "${#task[@]}" -eq 0 ]; then
    echo "error: $1/task-$SLURM_ARRAY_TASK_ID.args cannot be read; submit again with slurm/submit" >&2
    exit 2
  fi
}

# Prints the id of this job. The array's own job id refers to all its tasks; this one refers to a single task.
array_task() { echo "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"; }

# Puts a job back into the queue and ends the batch script.
put_back() {
  for _ in 1 2 3 4 5 6 7 8 9 10; do
    if scontrol requeue "$1"; then
      sleep 60 # Slurm ends this shell meanwhile
      exit 0
    fi
    sleep 20 # the controller may be busy or restarting
  done
  echo "error: job $1 could not be put back into the queue; submit it again" >&2
  exit 1
}

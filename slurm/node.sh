#!/bin/bash
# Starts this node's ranks: node.sh REPOSITORY LOG-PREFIX ARGUMENTS-OF-pretrain_dlm.py...
# srun runs it once on each node; SLURM_NODEID is correct only here, not on the batch host.
case ${1:-} in -h | --help) sed -n '/^# [A-Z]/,/^[^#]/s/^# \{0,1\}//p' "$0" && exit 0 ;; esac
set -u
home=$1 log=$2
shift 2
exec >>"$log.node$SLURM_NODEID.log" 2>&1
# Slurm signals every process of a step, so the ranks receive USR2 and TERM directly. torchrun must ignore both: USR2
# would kill it and leave its ranks behind; on TERM it would kill the ranks after 30 s and then fail although all of
# them ended normally, so that --kill-on-bad-exit would end the other nodes in the middle of the checkpoint. Ignored
# signals stay ignored across exec, and each rank installs its own handlers once it can act on a signal.
trap '' USR2 TERM
export PET_SIGNALS_TO_HANDLE=SIGINT,SIGHUP,SIGQUIT # used by torch 2.10 and newer; an older torchrun still handles TERM
exec "$MEGADIFF_PYTHON" -m torch.distributed.run \
  --nnodes="$SLURM_NNODES" --nproc-per-node="$MEGADIFF_RANKS_PER_NODE" --node-rank="$SLURM_NODEID" \
  --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" \
  "$home/pretrain_dlm.py" "$@"

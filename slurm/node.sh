#!/bin/bash
# Starts this node's ranks: node.sh REPOSITORY LOG-PREFIX ARGUMENTS-OF-pretrain_dlm.py...
# srun runs it once on each node; SLURM_NODEID is only right when it is read here and not on the batch host.
case ${1:-} in -h | --help) sed -n '/^# [A-Z]/,/^[^#]/s/^# \{0,1\}//p' "$0" && exit 0 ;; esac
set -u
home=$1 log=$2
shift 2
exec >>"$log.node$SLURM_NODEID.log" 2>&1
# Slurm signals every process of a step, so the ranks hear of USR2 and TERM without torchrun, which would do harm: it
# dies of USR2 and leaves its ranks behind; at TERM it kills them after 30 s and then fails although all of them ended
# well, upon which --kill-on-bad-exit would end the other nodes in the middle of the checkpoint. What is ignored stays
# ignored across exec, and each rank installs its own handlers once it can act on a signal.
trap '' USR2 TERM
export PET_SIGNALS_TO_HANDLE=SIGINT,SIGHUP,SIGQUIT # read from torch 2.10 on; an older torchrun takes TERM all the same
exec "$MEGADIFF_PYTHON" -m torch.distributed.run \
  --nnodes="$SLURM_NNODES" --nproc-per-node="$MEGADIFF_RANKS_PER_NODE" --node-rank="$SLURM_NODEID" \
  --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" \
  "$home/pretrain_dlm.py" "$@"

#!/usr/bin/env bash
# Trains on GPUs under SLURM, one process a GPU, on several nodes.
#
#   TOPOLOGY=h100:16x8 WORKDIR=/shared/runs/prmoe \
#     bash experiments/launch/slurm.sh [--dry-run] paper:prmoe_1.3b \
#     --config.data.corpus=tokens:/shared/shards [settings…]
#
#   TOPOLOGY   GPU:NODESxGPUS
#   WORKDIR    a folder that all nodes see, or gs://BUCKET/FOLDER
#   NAME       the job (default: prmoe)
#   VENV       the environment, on a disk that all nodes see (default: .venv of the repository)
#   PRICE      of a GPU for an hour; PLAN=no leaves the plan out
#   TEACHER    the config of the model that teaches, for the plan
#
# sbatch's own variables choose the rest: SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT, …
# shellcheck source=experiments/launch/common.sh
source "$(dirname "$0")/common.sh"
arguments "$@"
topology
required WORKDIR 'a folder that all nodes see, or gs://BUCKET/FOLDER'
[[ $slices == 1 && $shape =~ ^([0-9]+)x([0-9]+)$ ]] ||
  fail "TOPOLOGY=$TOPOLOGY must be GPU:NODESxGPUS, such as h100:16x8"
hosts=${BASH_REMATCH[1]} gpus=${BASH_REMATCH[2]}
VENV=${VENV:-$repository/.venv}

prmoe=$VENV/bin/prmoe
if [[ ! -x $VENV/bin/prmoe ]]; then
  step 'install it' \
    "python3 -m venv $(quote "$VENV")
$(quote "$VENV/bin/pip") install --quiet -e $(quote "${repository}[data,gcs,cuda]")"
fi
plan
# Not --gpus-per-task, which would hide all GPUs but one: JAX takes the one of the local rank.
step "queue the job: srun starts the command $((hosts * gpus)) times" \
  "sbatch --job-name=$(quote "${NAME:-prmoe}") --nodes=$hosts --ntasks-per-node=$gpus --gpus-per-node=$gpus \\
    $(quote "$repository/experiments/launch/slurm.sbatch") \\
    $(quote "$VENV/bin/prmoe") train --distributed --workdir=$(quote "$WORKDIR") $settings"

later 'Read the log, JOB being the number that sbatch prints:' 'tail -F slurm-JOB.out'
later 'Stop with a checkpoint. To resume, give the same command again:' 'scancel --signal=TERM JOB.0'
go

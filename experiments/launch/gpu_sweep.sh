#!/usr/bin/env bash
# Trains a sweep's runs on one GPU, several at once, and stops after some minutes: each run saves a
# checkpoint, and the same command goes on. It ends with 0 when all runs are recorded or time is up.
#
#   bash experiments/launch/gpu_sweep.sh [--dry-run] experiments/multiplier [options of prmoe sweep]
#
#   RUNS      runs that share the GPU (default: one for each 8 GB of its memory)
#   MINUTES   when to stop, a little before a limit of the machine's (default: 9)
# shellcheck source=experiments/launch/common.sh
source "$(dirname "$0")/common.sh"
dry_run=no
if [[ ${1:-} == --dry-run ]]; then
  dry_run=yes
  shift
fi
[[ $# -gt 0 && $1 != -* ]] ||
  fail "the sweep is missing: bash $recipe [--dry-run] experiments/multiplier [options]"
if [[ -z ${RUNS:-} ]]; then
  megabytes=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null | head -1) || true
  [[ $megabytes =~ ^[0-9]+$ ]] || fail "nvidia-smi names no GPU; give RUNS=4 or the like"
  RUNS=$((megabytes < 8000 ? 1 : megabytes / 8000))
fi
[[ $RUNS =~ ^[1-9][0-9]?$ ]] || fail "RUNS=$RUNS must be a number from 1 to 99"
MINUTES=${MINUTES:-9}
[[ $MINUTES =~ ^[0-9]+([.][0-9]+)?$ && $MINUTES =~ [1-9] ]] ||
  fail "MINUTES=$MINUTES must be a number above 0"

# The runs are dealt out by shards. `timeout` ends with 124 where it had to stop one. A signal reaches
# them through the trap, since `timeout` puts each into a process group of its own.
step "train for $MINUTES minutes, $RUNS runs at a time" \
  "unset XLA_PYTHON_CLIENT_MEM_FRACTION
export XLA_CLIENT_MEM_FRACTION=$(awk "BEGIN { printf \"%.3f\", 0.9 / $RUNS }")
shards=()
trap 'kill -INT \"\${shards[@]}\"; wait; exit 130' INT TERM
for i in {1..$RUNS}; do
  timeout --signal=INT ${MINUTES}m prmoe sweep $(quote "$@") --shard=\$i/$RUNS &
  shards+=(\$!)
done
code=0
for shard in \"\${shards[@]}\"; do
  wait \"\$shard\" || { now=\$?; [[ \$now == 124 ]] || code=\$now; }
done
exit \$code"

later 'The records so far:' "prmoe report $(quote "$1")"
go

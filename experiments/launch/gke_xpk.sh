#!/usr/bin/env bash
# Trains on a GKE cluster made by xpk (https://github.com/AI-Hypercomputer/xpk):
#   CLUSTER=my-cluster TPU_TYPE=v5p-256 IMAGE=…/prmoe:latest WORKDIR=/mnt/shared/run \
#     bash gke_xpk.sh CONFIG [settings…]
# IMAGE holds the repository at /prmoe, installed with `pip install -e '/prmoe[data,tpu]'`; WORKDIR
# is on a volume that every pod mounts (`xpk storage attach`).
set -euo pipefail
: "${CLUSTER:?}" "${TPU_TYPE:?}" "${IMAGE:?}" "${WORKDIR:?}" "${NAME:=prmoe-$(date +%m%d-%H%M)}"
config=$1
shift
printf -v settings ' %q' "$@"
xpk workload create --cluster="$CLUSTER" --tpu-type="$TPU_TYPE" --workload="$NAME" \
  --docker-image="$IMAGE" --command="cd /prmoe &&
    prmoe train --distributed --config='$config' --workdir='$WORKDIR'$settings"

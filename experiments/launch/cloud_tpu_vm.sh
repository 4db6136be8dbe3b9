#!/usr/bin/env bash
# Trains on all hosts of a Cloud TPU slice, which exists already:
#   TPU=my-slice ZONE=us-east5-a WORKDIR=gs-mounted/folder bash cloud_tpu_vm.sh CONFIG [settings…]
# for example
#   … bash cloud_tpu_vm.sh configs/paper.py:prmoe_1.3b --config.mesh.expert=64 \
#       --config.mesh.data=1 --config.mesh.fsdp=-1
# WORKDIR and the repository must be on a disk that every host mounts (Filestore, or a bucket by
# gcsfuse); REPOSITORY is where the latter is there.
set -euo pipefail
: "${TPU:?}" "${ZONE:?}" "${WORKDIR:?}" "${REPOSITORY:=$PWD}"
config=$1
shift
printf -v settings ' %q' "$@"
gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="
  cd '$REPOSITORY' &&
  { test -x ~/prmoe/bin/prmoe || { python3 -m venv ~/prmoe &&
    ~/prmoe/bin/pip install --quiet -e '.[data,tpu]'; }; } &&
  ~/prmoe/bin/prmoe train --distributed --config='$config' --workdir='$WORKDIR'$settings"

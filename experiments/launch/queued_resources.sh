#!/usr/bin/env bash
# Trains on Cloud TPU VMs that a queued resource gets: one slice or several.
#
#   NAME=prmoe ZONE=us-east5-a TOPOLOGY=2xv5p:4x4x8 WORKDIR=gs://BUCKET/runs/prmoe \
#     bash experiments/launch/queued_resources.sh [--dry-run] paper:prmoe_1.3b \
#     --config.data.corpus=tokens:gs://BUCKET/shards [settings…]
#
#   NAME      the queued resource; its slices are NAME, or NAME-0, NAME-1, …
#   SPOT      yes for spot capacity, which may be taken away (default: no)
#   PROJECT   Google Cloud's project (default: gcloud's)
#   RUNTIME   the TPU VM's software (default: the usual one for the chip)
#   PRICE     of a chip for an hour; PLAN=no leaves the plan out
#   TEACHER   the config of the model that teaches, for the plan
#
# Needs gcloud, logged in. The VMs' service account must be allowed to write to the bucket, and the VMs
# need the internet, for Python and its packages.
# shellcheck disable=SC2016,SC2088  # what is in quotes expands on the TPU VMs
# shellcheck source=experiments/launch/common.sh
source "$(dirname "$0")/common.sh"
arguments "$@"
required NAME 'a name for the queued resource'
required ZONE 'a zone that has these TPUs'
topology
store

slice_chips=$((${shape//x/*}))
case $chip in
  # The shape itself is asked for where several shapes have as many chips.
  v4) kind="--type=v4 --topology=$shape" runtime=tpu-ubuntu2204-base ;;
  v5p) kind="--type=v5p --topology=$shape" runtime=v2-alpha-tpuv5 ;;
  v5e) kind="--accelerator-type=v5litepod-$slice_chips" runtime=v2-alpha-tpuv5-lite ;;
  v6e) kind="--accelerator-type=v6e-$slice_chips" runtime=v2-alpha-tpuv6e ;;
  *) fail "TOPOLOGY=$TOPOLOGY: queued resources have v4, v5e, v5p and v6e; use gke_xpk.sh for tpu7x" ;;
esac
nodes="--node-id=$(quote "$NAME")"
[[ $slices == 1 ]] || nodes="--node-count=$slices --node-prefix=$(quote "$NAME")"
spot=
[[ ${SPOT:-no} == no ]] || spot=' --spot'

gcloud='gcloud compute tpus queued-resources'
queue=$(quote "$NAME")
where="--zone=$(quote "$ZONE")${PROJECT:+ --project=$(quote "$PROJECT")}"
all="$where --node=all --worker=all --batch-size=all"
on_all() { echo "$gcloud ssh $queue $all --command=$(quote "$1")"; }

plan
step "ask for $slices x $chip:$shape, unless it was asked for before" \
  "$gcloud describe $queue $where >/dev/null 2>&1 ||
  $gcloud create $queue $where \\
    $kind $nodes --runtime-version=$(quote "${RUNTIME:-$runtime}")$spot"
step 'wait for the slices' \
  "(silent=0; while true; do
  state=\$($gcloud describe $queue $where --format='value(state.state)') || state='no answer'
  echo \"\$(date +%H:%M:%S) \$state\"
  [[ \$state == 'no answer' ]] || silent=0
  case \$state in
    'no answer') ((++silent < 20)) || { echo 'gcloud did not answer for 10 minutes' >&2; exit 1; } ;;
    ACTIVE) break ;;
    FAILED | SUSPENDING | SUSPENDED) echo 'delete it (see below), and start again' >&2; exit 1 ;;
  esac
  sleep 30
done)"
build=$(quote "$repository/build")
step 'build the wheel and copy it to all hosts' \
  "rm -rf $build/launch $build/lib
python3 -m pip wheel --quiet --no-deps --wheel-dir=$build/launch $(quote "$repository")
$gcloud scp $build/launch/prmoe_jax-*.whl $queue: $all"
# The VMs' own Python is older than 3.11; uv brings another one.
step 'install it there' \
  "$(on_all 'python3 -m pip install --quiet --user uv &&
    ~/.local/bin/uv venv --quiet --allow-existing --python=3.13 ~/prmoe &&
    ~/.local/bin/uv pip install --quiet --python=$HOME/prmoe/bin/python \
      --reinstall-package=prmoe_jax "$(ls -t ~/prmoe_jax-*.whl | head -n 1)[data,gcs,tpu]"')"
train="~/prmoe/bin/prmoe train --distributed --workdir=$(quote "$WORKDIR") $settings"
step 'train, also when this connection ends' \
  "$(on_all "nohup $train >> ~/train.log 2>&1 < /dev/null &")"

later 'Read the log of the first host:' \
  "$gcloud ssh $queue $where --node=0 --worker=0 --command='tail -n 50 -F ~/train.log'"
later 'Stop with a checkpoint. To resume, give the same command again:' \
  "$(on_all 'pkill -TERM -x prmoe')"
later 'Delete the slices, which cost money until then, and after a spot slice was taken away:' \
  "$gcloud delete $queue $where --force"
go

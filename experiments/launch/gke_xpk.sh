#!/usr/bin/env bash
# Trains on GKE, on a cluster that xpk (pip install xpk) makes: one slice or several.
#
#   CLUSTER=pod ZONE=us-east5-a TOPOLOGY=2xv5p:4x4x8 WORKDIR=gs://BUCKET/runs/prmoe \
#     IMAGE=us-docker.pkg.dev/PROJECT/REPOSITORY/prmoe \
#     bash experiments/launch/gke_xpk.sh [--dry-run] paper:prmoe_1.3b \
#     --config.data.corpus=tokens:gs://BUCKET/shards [settings…]
#
#   IMAGE      where the image is pushed to, without a tag; the tag is the commit's
#   NAME       the workload (default: prmoe)
#   SPOT       yes for spot capacity, which may be taken away (default: no)
#   PROJECT    Google Cloud's project (default: gcloud's)
#   PRICE      of a chip for an hour; PLAN=no leaves the plan out
#   TEACHER    the config of the model that teaches, for the plan
#
# Needs gcloud, logged in (also for docker: gcloud auth configure-docker), docker with buildx, and
# xpk. The cluster's service account must be allowed to write to the bucket.
# shellcheck source=experiments/launch/common.sh
source "$(dirname "$0")/common.sh"
arguments "$@"
required CLUSTER 'the name of a cluster, which is made if it is missing'
required ZONE 'a zone that has these TPUs'
required IMAGE 'us-docker.pkg.dev/PROJECT/REPOSITORY/prmoe'
topology
store

case $chip in
  v4 | v5p | v6e | tpu7x) kind=$chip-$shape ;;
  v5e) kind=v5litepod-$shape ;;
  *) fail "TOPOLOGY=$TOPOLOGY: this recipe knows v4, v5e, v5p, v6e and tpu7x" ;;
esac
capacity=--on-demand
[[ ${SPOT:-no} == no ]] || capacity=--spot
tag=$(quote "$IMAGE:$(git -C "$repository" rev-parse --short=12 HEAD)")
on=$(quote "--cluster=$CLUSTER")
workload=$(quote "--workload=${NAME:-prmoe}")
where="--zone=$(quote "$ZONE")${PROJECT:+ --project=$(quote "$PROJECT")}"
size="--tpu-type=$kind --num-slices=$slices"
# xpk sends SIGTERM to this command's process: exec, so that it is ours.
train="exec bash /prmoe/interruptible.sh prmoe train --distributed"
train+=" --workdir=$(quote "$WORKDIR") $settings"

plan
step 'build the image of this commit and push it' \
  "git -C $(quote "$repository") archive --format=tar HEAD |
  docker buildx build --platform=linux/amd64 --file=experiments/launch/Dockerfile \\
    --tag=$tag --push -"
step 'make the cluster; one that exists stays as it is' \
  "gcloud container clusters list${PROJECT:+ --project=$(quote "$PROJECT")} --format='value(name)' | grep -xF $(quote "$CLUSTER") >/dev/null ||
  xpk cluster create $on $where $size $capacity"
# Exit code 1 is a lost process, and 2 may be one that came too late or while the lease of the
# run before lasted. xpk itself restarts after 42 and after signals.
step 'start the workload' \
  "xpk workload create $on $where $workload \\
    $size --docker-image=$tag \\
    --max-restarts=50 --restart-on-exit-codes=1,2 --termination-grace-period-seconds=120 \\
    --command=$(quote "$train")"

later 'Read the log of the first host:' \
  "kubectl logs --follow --selector=jobset.sigs.k8s.io/jobset-name=$(quote "${NAME:-prmoe}"),jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
later 'Stop with a checkpoint, and free the name. To resume, give the same command again:' \
  "xpk workload delete $on $where $workload"
later 'Delete the cluster, which costs money until then:' \
  "xpk cluster delete $on $where"
go

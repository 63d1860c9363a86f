#!/bin/sh
# The steps of every training Job: check the settings, copy the data, train, evaluate, archive, verify, publish.
#
#   sh training/job.sh RECIPE      RECIPE as for `patchscan train`: ssp, resnet50, simplecnn, or a YAML file
#
# Settings are environment variables; the manifests in k8s/ say what each is for:
#   DATA SEEN UNSEEN EPOCHS DEVICE LOADERS     what `patchscan train` is given
#   WEIGHTS                                    what a ResNet50 starts from; unset for other models
#   ENGINE                                     what the archive is served with on a CPU; torch unless set
#   MIN_METRIC                                 what the model must reach to be published; empty: nothing
#   RUN MODEL_STORE VERSIONS REPORT            where the run, archive, its copy by digest and the report go
#   NODES GPUS                                 processes that train together, 1 and 1 unless set
#   WORK                                       folder for the data and what is made of it, /data unless set; a volume may
#                                              be mounted there, and hold RUN, MODEL_STORE and so on in other folders
#
# Killed at any moment, the same call goes on: the checkpoint is in RUN. The exit code is that of the step that failed:
# 2 where a setting is wrong and trying again cannot help, 3 where the model is not good enough, 75 where it was
# interrupted.
set -eu
trap : TERM  # the step under way receives it too and ends in order; without this the shell would end first

recipe=$1
work=${WORK:-/data}
scratch=$work/.job  # what each Job makes anew; a name that no setting has, such as RUN=/data/run
steps=

step() {  # step NAME COMMAND...: run a step and note how long it took
  name=$1
  shift
  began=$(date +%s)
  "$@"
  steps="$steps, $name $(($(date +%s) - began)) s"
}

check() {
  is_copied && listed=$data || listed=$DATA
  python -m patchscan.training.settings "$recipe" "$listed" "$work/set"
  case ${ENGINE:-torch} in
    torch | onnx | openvino) ;;
    *) echo "patchscan: ENGINE $ENGINE: there are torch, onnx and openvino" >&2 && exit 2 ;;
  esac
}

is_copied() {  # whether the copy of the data is whole
  [ "$training" = "$(cat "$work/set-for" 2> /dev/null)" ]
}

fetch_data() {
  case $DATA in s3://*) ;; *) return ;; esac
  # A volume keeps it between pods. Once it is whole it stays as it is, since a run goes on with the data it began with.
  if is_copied; then
    return
  fi
  rm -f "$work/set-for"
  if [ -e "$work/set" ] && [ ! -e "$work/set-of" ]; then
    echo "patchscan: $work/set is no copy that a Job has made: move it, or set DATA to it" >&2
    exit 2
  fi
  # The volume may also hold the copy of another training.
  kept=$(cat "$work/set-of" 2> /dev/null || echo "$DATA")
  if [ "$kept" != "$DATA" ]; then
    echo "$work/set holds a copy of $kept: $DATA replaces it"
    rm -rf "$work/set"
  fi
  echo "$DATA" > "$work/set-of"
  [ ! -d "$work/set" ] || python -m patchscan.dataset.outdated "$DATA" "$work/set"
  [ -f "$work/set/index.parquet" ] && indexed=yes || indexed=
  patchscan copy "$DATA" "$work/set" --skip-existing
  [ -z "$indexed" ] || patchscan index "$work/set"  # the index that is there leaves out what is new
  echo "$training" > "$work/set-for"
}

train() {
  if [ -f "$scratch/run/card.json" ] || [ "${NODES:-1}${GPUS:-1}" = 11 ]; then
    # Also where all was trained and pod 0 comes again to publish: the other nodes have ended and do not come.
    set -- patchscan train
  else
    set -- python -m patchscan.training.launch --nnodes "$NODES" --nproc-per-node "$GPUS" --max-restarts 20 \
      --rdzv-backend c10d --rdzv-id "$JOB_NAME" --rdzv-endpoint "$JOB_NAME-0.$SERVICE:29400" \
      --rdzv-conf join_timeout=3600 -m patchscan train
  fi
  "$@" "$recipe" --data "$data" --run "$RUN" --seen "$SEEN" --unseen "$UNSEEN" ${WEIGHTS:+--weights "$WEIGHTS"} \
    --epochs "$EPOCHS" --device "$DEVICE" --workers "$LOADERS"
}

fetch_run() {
  rm -rf "$scratch/run"  # a volume may hold another run's
  case $RUN in
    s3://*) patchscan copy "$RUN" "$scratch/run" ;;
    *) mkdir -p "$scratch/run" && cp -r "$RUN/." "$scratch/run" ;;
  esac
}

evaluate() {
  patchscan evaluate --run "$scratch/run" --data "$data" --out "$scratch/report" --device "$DEVICE"
  # Evaluating calibrated the card: the run that others will archive must hold that one.
  mkdir -p "$scratch/calibrated"
  cp "$scratch/run/card.json" "$scratch/calibrated/"
  patchscan copy "$scratch/calibrated" "$RUN"
  patchscan copy "$scratch/report" "$REPORT"
  [ -z "${MIN_METRIC:-}" ] || python -m patchscan.evaluation.quality "$MIN_METRIC" "$scratch/run"
}

archive() {
  rm -rf "$scratch/store"
  patchscan archive "$scratch/run" --model-store "$scratch/store" --engine "${ENGINE:-torch}"
  patchscan verify "$scratch"/store/*.mar
}

publish() {
  patchscan copy "$scratch/store" "$VERSIONS/$(sha256sum "$scratch"/store/*.mar | cut -c1-12)"
  patchscan copy "$scratch/store" "$MODEL_STORE"
}

case $DATA in
  s3://*) data=$work/set ;;
  *) data=$DATA ;;  # a folder that is mounted
esac
echo "train $recipe on $DATA ($DEVICE), run $RUN: check, copy, train, evaluate, archive, verify, publish to $MODEL_STORE"
training="$DATA for $RUN"
step check check
mkdir -p "$scratch"
if [ "${NODES:-1}" = 1 ]; then  # another Job on this volume would replace what this one reads
  exec 9> "$scratch/lock"
  code=0
  flock -n 9 || code=$?
  case $code in
    0) ;;
    1) echo "another Job works in $work: waiting until it has ended" && flock 9 || exit 75 ;;
    *) echo "the volume of $work has no locks: no other Job may work there" ;;
  esac
fi
step copy fetch_data
if [ "${NODES:-1}${GPUS:-1}" != 11 ]; then
  code=0
  fetch_run || code=$?
  case $code in
    0) ;;
    1 | 2) echo "no run in $RUN yet: training starts from the beginning" ;;
    *) exit "$code" ;;  # such as 75: the store is out of reach, which does not say that there is none
  esac
fi
step train train
if [ "${JOB_COMPLETION_INDEX:-0}" != 0 ]; then  # of several nodes, the first one does the rest
  echo "trained: ${steps#, }"
  exit 0
fi
fetch_run
step evaluate evaluate
step archive archive
step publish publish
echo "published to $MODEL_STORE: ${steps#, }"

#!/usr/bin/env bash
# Prints what runs a job on TPUs of a GKE cluster that is there already, through xpk
# (https://github.com/AI-Hypercomputer/xpk); it makes no cluster, and starts nothing.
#
#   experiments/tpu/xpk.sh my-cluster us-west4-a v5litepod-16 lm-1 \
#     experiments.lm --out gs://my-bucket/lm
#
# Read it, then append `| bash`, in the root of the checkout: xpk puts that into the
# image. gcloud must be logged in, with a default project. LIBTPU_INIT_ARGS goes to the
# job.
set -euo pipefail

if (($# < 5)); then
  echo "usage: ${0##*/} CLUSTER ZONE TPU-TYPE WORKLOAD MODULE [OPTION...]" >&2
  exit 2
fi
cluster=$1 zone=$2 type=$3 workload=$4
shift 4
settings=${LIBTPU_INIT_ARGS:+LIBTPU_INIT_ARGS=${LIBTPU_INIT_ARGS@Q} }
job="pip install -q -r requirements-tpu.txt"
job+=" && ${settings}exec python -m$(printf ' %q' "$@")"

# A workload that lost a host starts again, from the last checkpoint.
printf 'xpk workload create --cluster=%q --zone=%q --tpu-type=%q --workload=%q' \
  "$cluster" "$zone" "$type" "$workload"
printf ' --base-docker-image=python:3.11 --script-dir=. --max-restarts=10'
printf ' --command=%s </dev/null\n' "${job@Q}"

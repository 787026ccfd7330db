#!/usr/bin/env bash
# Prints what runs a job on all hosts of a Cloud TPU slice that is there already; it
# makes no slice, and starts nothing.
#
#   experiments/tpu/tpu_vm.sh my-slice us-west4-a experiments.lm --out gs://my-bucket/lm
#
# Read it, then append `| bash`. gcloud must be logged in, with a default project. PYTHON
# names the interpreter of the hosts, 3.11 or later; LIBTPU_INIT_ARGS goes to the job.
set -euo pipefail

if (($# < 3)); then
  echo "usage: ${0##*/} SLICE ZONE MODULE [OPTION...]" >&2
  exit 2
fi
slice=$1 zone=$2
shift 2
# gcloud must not read the rest of what is piped to bash.
on_all() {
  printf 'gcloud compute tpus tpu-vm ssh %q --zone=%q --worker=all' "$slice" "$zone"
  printf ' --command=%s </dev/null\n' "${1@Q}"
}

unpack='mkdir -p kdjax && tar -xzf kdjax.tar.gz -C kdjax'
install="${PYTHON:-python3} -m venv .venv"
install+=" && .venv/bin/pip install -q -r requirements-tpu.txt"
settings=${LIBTPU_INIT_ARGS:+LIBTPU_INIT_ARGS=${LIBTPU_INIT_ARGS@Q} }
job="cd kdjax && $settings.venv/bin/python -m$(printf ' %q' "$@")"

echo "set -euo pipefail"
echo "# What is committed, to every host."
echo "git archive --format=tar.gz --output=kdjax.tar.gz HEAD"
printf 'gcloud compute tpus tpu-vm scp kdjax.tar.gz %q: --zone=%q --worker=all' \
  "$slice" "$zone"
echo " </dev/null"
on_all "$unpack && cd kdjax && $install"
echo "# The same command on every host; JAX finds the others. The first one prints."
on_all "$job"

#!/usr/bin/env bash
# Prints what runs a job as several processes on this machine; it starts nothing.
#
#   experiments/tpu/local.sh 2 experiments.digits --out runs/digits | bash
#
# Each process has one CPU device. PYTHON is the interpreter, PORT a free port.
set -euo pipefail

if (($# < 2)) || ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: ${0##*/} PROCESSES MODULE [OPTION...], such as 2 experiments.digits" >&2
  exit 2
fi
processes=$1
shift
job=$(printf ' %q' "${PYTHON:-python3}" -m "$@")

echo "export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=1"
echo "pids=()"
# One SIGTERM stops all of them: they save at the same step. So does Ctrl-C, which a
# shell keeps from what it runs in the background.
cat <<'END'
trap 'kill -TERM "${pids[0]}"' TERM INT HUP
END
for ((id = 0; id < processes; id++)); do
  printf '%s %s %s %s & pids+=($!)\n' "${job# }" \
    "--cluster.coordinator-address=127.0.0.1:${PORT:-8476}" \
    "--cluster.num-processes=$processes" "--cluster.process-id=$id"
done
cat <<'END'
status=0
for pid in "${pids[@]}"; do
  until wait "$pid"; ended=$?; ! kill -0 "$pid" 2>/dev/null; do :; done
  if ((ended)); then status=$ended; fi
done
exit "$status"
END

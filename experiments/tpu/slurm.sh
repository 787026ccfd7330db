#!/usr/bin/env bash
# Prints a batch file for a Slurm cluster with GPUs, one process for each; it submits
# nothing.
#
#   experiments/tpu/slurm.sh 2 8 experiments.lm --out /shared/lm
#
# Read it, then append `| sbatch`, in the root of a checkout that all nodes see, with a
# virtual environment in .venv: pip install --editable '.[cuda,experiments,buckets]'
set -euo pipefail

number='^[1-9][0-9]*$'
if (($# < 3)) || ! [[ $1 =~ $number && $2 =~ $number ]]; then
  echo "usage: ${0##*/} NODES GPUS-PER-NODE MODULE [OPTION...], such as 2 8 experiments.lm" >&2
  exit 2
fi
nodes=$1 gpus=$2
shift 2

cat <<END
#!/usr/bin/env bash
#SBATCH --job-name=kdjax
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=$gpus
#SBATCH --gpus-per-node=$gpus
#SBATCH --requeue
# Time to save, before the limit and before others take the nodes.
#SBATCH --signal=TERM@120
# A process that died ends its step, and the others with it.
srun --kill-on-bad-exit=1 .venv/bin/python -m$(printf ' %q' "$@")
status=\$?
# 143: interrupted and saved. The same job goes on when it has nodes again.
if ((status == 143)); then scontrol requeue "\$SLURM_JOB_ID"; fi
exit "\$status"
END

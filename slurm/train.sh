#!/usr/bin/env bash
#SBATCH --job-name=xdist
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --time=1440
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
# sbatch [options] slurm/train.sh CONFIG [key=value ...]
# Options of sbatch replace those above: sbatch -N2 --ntasks=8 --gpus-per-task=1 ...
# Written by `xdist launch slurm --print`; docs/slurm.md explains it.
set -euo pipefail
: "${1:?usage: sbatch [options] slurm/train.sh CONFIG [key=value ...]}"
python="${XDIST_PYTHON:-$(command -v .venv/bin/python || command -v python3)}"
job=("$python" -P -m xdist_launchers.slurm_job)
node="$(scontrol show node "$SLURMD_NODENAME" | sed -n 's/^ *NodeAddr=\([^ ]*\).*/\1/p')"

# Before the time limit Slurm signals this script alone; srun hands the signal on to every rank.
# At scancel Slurm tells the ranks by itself, and this script waits for them.
asked=no ranks=
trap 'asked=yes; [[ -z "$ranks" ]] || kill -USR1 "$ranks" || true' USR1
trap ':' TERM

# A step that is not told how many cards a task needs lets each task see all cards of its node:
# NCCL wants that, and LOCAL_RANK picks one.
unset SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK

next=start
while [[ "$next" == start ]]; do
  meeting="$("${job[@]}" begin any "$node" "$@")"
  read -r MASTER_ADDR MASTER_PORT XDIST_NONCE <<<"$meeting"
  export MASTER_ADDR MASTER_PORT XDIST_NONCE
  srun --kill-on-bad-exit=1 --export=ALL --mpi=none --input=none --distribution=block \
    --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    "${job[@]}" rank "$@" &
  ranks=$!
  # A signal ends `wait` early; the code of a process that has ended is kept.
  while kill -0 "$ranks" 2>/dev/null; do wait "$ranks" || true; done
  code=0
  wait "$ranks" || code=$?
  ranks=
  # Prints what comes next, and ends with the code of the rank that failed first.
  code_of_srun=$code code=0
  next="$("${job[@]}" end "$code_of_srun" "$asked" "$@")" || code=$?
  if [[ "$next" == requeue ]]; then
    scontrol requeue "$SLURM_JOB_ID" || echo "xdist: not requeued; submit it again" >&2
  fi
done
exit "$code"

#!/usr/bin/env bash
#SBATCH --job-name=xdist-ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --time=1440
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
# sbatch [options] slurm/ray.sh CONFIG [key=value ...]
# One Ray node on each node of the allocation, then `xdist launch ray` on them. One task a node:
# --cpus-per-task and --gpus-per-node are those of a whole node. docs/ray.md explains it.
set -euo pipefail
umask 077
: "${1:?usage: sbatch [options] slurm/ray.sh CONFIG [key=value ...]}"
python="${XDIST_PYTHON:-$(command -v .venv/bin/python || command -v python3)}"
launchers=("$python" -P -m)

# Every node reads the token and the head's address here: a folder that all nodes share.
shared="$(mktemp -d "${XDIST_SHARED:-$PWD}/.xdist-ray-XXXXXX")"
head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' > "$shared/token"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$shared/token" RAY_USAGE_STATS_ENABLED=0
unset RAY_ADDRESS RAY_JOB_CONFIG_JSON_ENV_VAR
# One node alone keeps to loopback, and so must who talks to it.
if [[ "$SLURM_NNODES" == 1 ]]; then export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0; fi

nodes='' driver='' asked=no
# shellcheck disable=SC2317  # the trap calls it
finish() {
  if [[ -n "$nodes" ]]; then
    # The nodes end by themselves, so that each clears its own disk; srun would kill them.
    touch "$shared/stop"
    for _ in {1..60}; do kill -0 "$nodes" 2>/dev/null || break; sleep 0.5; done
    kill -TERM "$nodes" 2>/dev/null || true
    wait "$nodes" || true
  fi
  rm -rf "$shared"
}
trap finish EXIT
# The driver asks every rank to finish its step and save.
trap 'asked=yes; [[ -z "$driver" ]] || kill -TERM "$driver" || true' USR1
trap '[[ -z "$driver" ]] || kill -TERM "$driver" || true' TERM

srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --export=ALL --mpi=none --input=none \
  "${launchers[@]}" xdist_launchers.ray_node "$shared" &
nodes=$!
until [[ -e "$shared/address" ]]; do
  kill -0 "$nodes" 2>/dev/null || { echo "xdist: the Ray nodes did not start" >&2; exit 3; }
  sleep 0.5
done

"${launchers[@]}" xdist_launchers.cli launch ray "$@" "ray.address=$(<"$shared/address")" &
driver=$!
# A signal ends `wait` early; the code of a process that has ended is kept.
while kill -0 "$driver" 2>/dev/null; do wait "$driver" || true; done
code=0
wait "$driver" || code=$?
finish
trap - EXIT
if [[ "$code" == 75 && "$asked" == yes ]]; then
  scontrol requeue "$SLURM_JOB_ID" || echo "xdist: not requeued; submit it again" >&2
fi
exit "$code"

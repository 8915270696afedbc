#!/usr/bin/env bash
# A job on Slurm: a Ray cluster on the nodes of the allocation, and bsq tokenize on it.
#
#   sbatch examples/slurm.sh JOB.YAML [options of bsq tokenize ...]
#
# Shards, output and tokenizer lie on a file system that every node has, or in an object store.  When the time is over
# Slurm signals this script first; what has been read is finished, and the same sbatch command goes on from there.
#SBATCH --job-name=bsqtok
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=4
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --output=bsqtok-%j.log
set -euo pipefail

if [ $# -lt 1 ]; then
  echo "usage: sbatch $0 JOB.YAML [options of bsq tokenize ...]" >&2
  exit 2
fi

# Where bsqtok is installed.  Change it to your environment.
if [ -n "${BSQTOK_VENV:-}" ]; then
  # shellcheck source=/dev/null
  source "$BSQTOK_VENV/bin/activate"
fi

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
# A name may stand for several addresses; the first is taken.
read -r head_ip _ < <(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address)
# A port of its own: nodes may be shared with other jobs.
port=$((20000 + SLURM_JOB_ID % 10000))
cpus=${SLURM_CPUS_PER_TASK:-1}
gpus=${SLURM_GPUS_ON_NODE:-0}
common=(--num-cpus="$cpus" --num-gpus="$gpus" --disable-usage-stats --block)

steps=()
srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap \
  ray start --head --node-ip-address="$head_ip" --port="$port" --include-dashboard=false "${common[@]}" &
steps+=($!)
for node in "${nodes[@]:1}"; do
  # A node tries again until the head is up.
  # shellcheck disable=SC2016  # expanded there, not here
  srun --nodes=1 --ntasks=1 --nodelist="$node" --overlap \
    bash -c 'until ray start --address="$0" "$@"; do sleep 2; done' "$head_ip:$port" "${common[@]}" &
  steps+=($!)
done
# Not waited for: Ray takes half a minute to end, and Slurm ends what is left.
trap 'kill "${steps[@]}" 2>/dev/null || true' EXIT

echo "Waiting for ${#nodes[@]} nodes at $head_ip:$port"
python - "$head_ip:$port" "${#nodes[@]}" <<'PYTHON'
import sys, time
import ray

address, wanted = sys.argv[1], int(sys.argv[2])
deadline = time.monotonic() + 300
while True:
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        if sum(node["Alive"] for node in ray.nodes()) >= wanted:
            break
        ray.shutdown()
    except (ConnectionError, RuntimeError) as error:
        print(f"not yet: {error}", file=sys.stderr)
    if time.monotonic() > deadline:
        sys.exit(f"only some of {wanted} nodes joined within five minutes")
    time.sleep(2)
PYTHON

# In the background, so that a signal reaches the trap while it runs.
bsq tokenize --config "$1" --ray-address "$head_ip:$port" "${@:2}" &
driver=$!
trap 'kill -TERM "$driver"' TERM INT
code=0
wait "$driver" || code=$?
# A signal ends the first wait early; the driver's own exit code comes from the second.
if kill -0 "$driver" 2>/dev/null; then
  code=0
  wait "$driver" || code=$?
fi
exit "$code"

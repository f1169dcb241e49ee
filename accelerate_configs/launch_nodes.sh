#!/usr/bin/env bash
# Starts a script on this machine as one of several; run the same line on each of them.
#
#   NUM_MACHINES=2 MACHINE_RANK=0 MAIN_ADDRESS=10.0.0.1 accelerate_configs/launch_nodes.sh scripts/text_classify.py ...
#
# Under Slurm (see slurm.sbatch) all three are read from its variables.
# GPUS_PER_MACHINE: processes on each machine (default: its GPUs). CONFIG: launch config (default: multi_node.yaml).
# SHARD_OVER: with multi_node_hsdp.yaml, the processes that share one copy of the model (default: those of a machine).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
num_machines=${NUM_MACHINES:-${SLURM_NNODES:-1}}
machine_rank=${MACHINE_RANK:-${SLURM_NODEID:-0}}
main_port=${MAIN_PORT:-29500}
if [ -z "${MAIN_ADDRESS:-}" ]; then
  if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    MAIN_ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  elif [ "$num_machines" -gt 1 ]; then
    echo "error: MAIN_ADDRESS is not set: the address of machine 0, which the others can reach" >&2
    exit 2
  else
    MAIN_ADDRESS=127.0.0.1
  fi
fi
per_machine=${GPUS_PER_MACHINE:-$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)}
if [ "$per_machine" -lt 1 ]; then
  echo "error: no GPU found: set GPUS_PER_MACHINE to the number of processes a machine shall run" >&2
  exit 2
fi
num_processes=$((num_machines * per_machine))
shard_over=${SHARD_OVER:-$per_machine}
if [ "$shard_over" -lt 1 ] || [ $((num_processes % shard_over)) -ne 0 ]; then
  echo "error: SHARD_OVER=$shard_over does not divide the number of processes, $num_processes" >&2
  exit 2
fi
if [ $# -lt 1 ]; then
  echo "usage: NUM_MACHINES=2 MACHINE_RANK=0 MAIN_ADDRESS=10.0.0.1 $0 SCRIPT [ARGUMENT ...]" >&2
  exit 2
fi

# The two sizes of the mesh have an effect only with a config that has a parallelism_config.
exec accelerate launch \
  --config_file "${CONFIG:-$here/multi_node.yaml}" \
  --num_machines "$num_machines" --machine_rank "$machine_rank" \
  --num_processes "$num_processes" \
  --parallelism_config_dp_replicate_size "$((num_processes / shard_over))" \
  --parallelism_config_dp_shard_size "$shard_over" \
  --main_process_ip "$MAIN_ADDRESS" --main_process_port "$main_port" \
  "$@"

#!/usr/bin/env bash
# One training run on real nodes. Start it on every node of the job:
#
#   NNODES=8 NODE_RANK=<0..7> MASTER_ADDR=<node 0> bash launch/torchrun.sh RUN.yaml [key=value ...]
#
# On one node nothing but the file is needed. The same command goes on after an interruption.
#   GPUS_PER_NODE   processes per node (default: the GPUs that nvidia-smi lists)
#   MASTER_PORT     rendezvous port on node 0 (default 29500)
set -euo pipefail

[ $# -ge 1 ] || { echo "usage: [NNODES= NODE_RANK= MASTER_ADDR=] $0 RUN.yaml [key=value ...]" >&2; exit 2; }
nodes=${NNODES:-1}
if [ "$nodes" -gt 1 ] && { [ -z "${MASTER_ADDR:-}" ] || [ -z "${NODE_RANK:-}" ]; }; then
    echo "octo: error: NNODES=$nodes needs MASTER_ADDR (address of node 0) and NODE_RANK (0..$((nodes - 1)))" >&2
    exit 2
fi
gpus=${GPUS_PER_NODE:-$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)}
[ "$gpus" -gt 0 ] || { echo "octo: error: no GPU found; fix: set GPUS_PER_NODE, or use 'octo train' on a CPU machine" >&2; exit 6; }

export CUDA_DEVICE_MAX_CONNECTIONS=1     # Megatron's overlap of tensor-parallel communication relies on the order of launches
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1 # a dead peer ends the job within the collective's timeout
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

exec torchrun --nnodes "$nodes" --node-rank "${NODE_RANK:-0}" --nproc-per-node "$gpus" \
    --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" \
    -m megatron_octo.train "$@"

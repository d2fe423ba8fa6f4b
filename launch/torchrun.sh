#!/usr/bin/env bash
# One training run on real nodes. Start it on every node of the job:
#
#   NNODES=8 NODE_RANK=<0..7> MASTER_ADDR=<node 0> bash launch/torchrun.sh RUN.yaml [key=value ...]
#
# On one node nothing but the file is needed. The same command goes on after an interruption.
#   GPUS_PER_NODE   processes per node (default: the GPUs that nvidia-smi lists)
#   MASTER_PORT     rendezvous port on node 0 (default 29500)
set -euo pipefail

octo_fail() { # exit code, message
    echo "octo: error: $2" >&2
    exit "$1"
}

[ $# -ge 1 ] || { echo "usage: [NNODES= NODE_RANK= MASTER_ADDR=] $0 RUN.yaml [key=value ...]" >&2; exit 2; }
nodes=${NNODES:-1} port=${MASTER_PORT:-29500}
gpus=${GPUS_PER_NODE:-$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)}
for number in "NNODES=$nodes" "NODE_RANK=${NODE_RANK:-0}" "GPUS_PER_NODE=$gpus" "MASTER_PORT=$port"; do
    [[ $number =~ =[0-9]+$ ]] || octo_fail 2 "$number is not a number"
done
if [ "$nodes" -gt 1 ] && { [ -z "${MASTER_ADDR:-}" ] || [ -z "${NODE_RANK:-}" ]; }; then
    octo_fail 2 "NNODES=$nodes needs MASTER_ADDR (address of node 0) and NODE_RANK (0..$((nodes - 1)))"
fi
[ "$gpus" -gt 0 ] || octo_fail 6 "no GPU found; fix: set GPUS_PER_NODE, or use 'octo train' on a CPU machine"
command -v torchrun >/dev/null || octo_fail 6 "torchrun is not on PATH; fix: activate the environment with megatron_octo"
if [ "${NODE_RANK:-0}" -eq 0 ] && (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
    octo_fail 6 "port $port is in use on this node; fix: set MASTER_PORT to a free one, the same on every node"
fi

export CUDA_DEVICE_MAX_CONNECTIONS=1     # Megatron's overlap of tensor-parallel communication relies on the order of launches
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1 # a dead peer ends the job within the collective's timeout
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

exec torchrun --nnodes "$nodes" --node-rank "${NODE_RANK:-0}" --nproc-per-node "$gpus" \
    --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "$port" \
    -m megatron_octo.train "$@"

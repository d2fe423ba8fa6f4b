"""Names of vllm.distributed."""

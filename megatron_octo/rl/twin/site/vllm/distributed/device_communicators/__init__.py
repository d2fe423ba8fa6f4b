"""Names of vllm.distributed.device_communicators."""

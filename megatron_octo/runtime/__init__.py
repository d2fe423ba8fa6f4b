"""Where a run happens: device, process groups, launching, and what megatron-core needs without CUDA."""

"""What is trained: families translated to megatron-core, built, initialised and counted."""

"""megatron_octo: OctoThinker's mid-training and RL on Megatron-Core, from data to report."""

__version__ = "0.1.0"

"""Hugging Face directories <-> sealed Megatron checkpoints: one table read both ways, and a certificate."""

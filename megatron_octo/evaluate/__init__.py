"""Benchmarks, prompts, generation, extraction, the one grader, scores. Knows nothing of training."""

"""What a run reads: mixtures of indexed datasets, the order of their windows, and who read what."""

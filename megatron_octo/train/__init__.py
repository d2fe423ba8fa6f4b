"""Training: the loop, the step, the state, and hooks for everything optional."""

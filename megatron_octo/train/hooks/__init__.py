"""Everything optional around a step. Each hook is one class that owns its state."""

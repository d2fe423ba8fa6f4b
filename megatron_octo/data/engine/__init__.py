"""Stages of tasks, what runs them, and the build of a data directory out of them."""

"""Durable state: a checkpoint is sealed or it does not exist."""

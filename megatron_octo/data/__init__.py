"""Corpora -> tokenised, indexed, mixed: what training reads."""

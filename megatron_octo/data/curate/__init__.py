"""Curation: a sample is judged by a language model, a classifier learns its judgement, and what it keeps is refined."""

"""Corpora in whatever shape they are published: which there are, their files, their records, their text."""

"""What a build leaves out of its corpora: duplicates, and what the benchmarks ask."""

"""The tree of stages: what follows what, what is done, what runs now. Stages are processes and files."""

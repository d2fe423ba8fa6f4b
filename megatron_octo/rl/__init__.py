"""Reinforcement from verifiable rewards: OpenRLHF's PPO, its inputs, its command line and its CPU twin."""

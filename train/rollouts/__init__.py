"""Reinforcement learning of adapters: tasks, samples of an engine, rewards, advantages, and a run of ``train.rl``."""

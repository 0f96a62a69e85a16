"""Reinforcement learning with verifiable rewards: GRPO in its published forms, rewards, generated tasks."""

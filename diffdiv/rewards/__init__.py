"""Rewards: what a model is fine-tuned to make more of."""

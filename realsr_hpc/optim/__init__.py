"""Optimizer step and learning-rate schedule."""

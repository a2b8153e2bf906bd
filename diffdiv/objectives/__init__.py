"""Objectives: pure functions of tensors and denoisers."""

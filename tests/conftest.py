"""Shared by all tests: one CPU thread (bitwise comparisons), and the folder of test helpers."""

import torch

torch.set_num_threads(1)

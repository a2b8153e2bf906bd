"""Shared by all tests: one CPU thread (bitwise comparisons), and the folder of shared builders."""

import torch

torch.set_num_threads(1)

"""Sources of data: by global sample index, the same on every rank and for every batch size."""

"""Mathematics: predictions, schedules, divergences, noise."""

"""Measures of generated samples; each says what it was computed with."""

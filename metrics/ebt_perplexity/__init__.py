"""Perplexity with thinking, an `evaluate` module."""

"""Structural similarity, an `evaluate` module."""

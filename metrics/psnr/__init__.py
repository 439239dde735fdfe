"""Peak signal-to-noise ratio, an `evaluate` module."""

"""How far thinking lowers the energy, an `evaluate` module."""

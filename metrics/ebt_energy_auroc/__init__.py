"""How well energies tell what is out of distribution, an `evaluate` module."""

"""How much memory a run takes, what would fit, and where the parts of a model wait."""

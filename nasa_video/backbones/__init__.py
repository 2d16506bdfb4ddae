"""How guidance is installed in each family of models."""

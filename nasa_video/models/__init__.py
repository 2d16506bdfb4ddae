"""Presets, a model of one's own, where weights come from, and how they are loaded."""

"""One-step and few-step image models: presets, loading, scale sweeps."""

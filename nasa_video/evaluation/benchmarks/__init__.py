"""Published benchmarks, each from its prompts to its results."""

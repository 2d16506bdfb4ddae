"""Faster or smaller: compilation with a static cache, offloading, sequence parallelism."""

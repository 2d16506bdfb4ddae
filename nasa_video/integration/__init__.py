"""Guidance for diffusers' own pipelines: one line for classic ones, a guider for modular ones."""

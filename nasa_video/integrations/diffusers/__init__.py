"""Guidance in diffusers' own pipelines: ``guided`` for ordinary ones, guiders for modular ones."""

"""Guidance in other people's pipelines and programs."""

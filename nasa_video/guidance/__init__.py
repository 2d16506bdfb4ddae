"""Negative guidance inside attention: formulas, methods, schedules, and the state that guided layers share."""

"""One video, from request to frames."""

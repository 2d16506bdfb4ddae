"""``nasa-video bench``: what a chunk costs under each method, side by side in one process."""

"""``nasa-video bench``: what a chunk costs under each method, side by side in one process."""

from nasa_video.bench.case import BenchSettings
from nasa_video.bench.measure import bench

__all__ = ["BenchSettings", "bench"]

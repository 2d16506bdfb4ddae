"""Measuring what guidance does: removal tables, picture quality, and the judges behind them."""

"""The shipped world: what its clips contain, how they are drawn and described, and what recognises them."""

"""Work that is shared out: stored results by content, shards, engines, processes."""

"""Video in and out: sinks that lose nothing, a source that checks what it reads, sheets that compare."""

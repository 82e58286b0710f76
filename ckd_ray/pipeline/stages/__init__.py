"""One file a stage: what it reads and writes, which settings change its result, and the work."""

"""Which shard goes to which worker, and what the death of a worker means. No Ray."""

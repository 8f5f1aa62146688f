"""Assignment of shards to workers, and the handling of workers that die. No Ray."""

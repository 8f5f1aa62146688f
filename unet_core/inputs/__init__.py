"""Where images are found, and how they are grouped into shards."""

"""Input containers: listing images as shards, reading them, and finding their truth."""

"""Where shards run: threads of this process, Ray actors, Ray tasks, and the ranks of Ray Train."""

"""Execution of shards: threads of this process, Ray actors, Ray tasks, ranks of Ray Train."""

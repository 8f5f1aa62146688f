"""One shard from its bytes to its commit: the device, tiles, masks, rows, one replica of it."""

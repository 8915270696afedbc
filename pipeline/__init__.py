"""From an open shard to a published token file, in one process."""

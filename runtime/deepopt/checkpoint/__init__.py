"""State of layers on disk: shards, manifests, commits, resharding, final weights."""

"""From raw meshes to prepared training shards."""

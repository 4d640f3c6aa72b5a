"""The benchmark of text-to-image models: pictures instead of meshes, and caches of others beside. See docs/benchmark.md."""

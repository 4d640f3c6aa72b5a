"""The benchmark of text-to-image models: pictures for meshes, and caches of others beside. See docs/benchmark.md."""

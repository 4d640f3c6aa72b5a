"""Elastic routing: decides, bypasses, narrows, caches, counts. Knows nothing of shapes or images."""

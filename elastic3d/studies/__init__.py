"""Studies beside the benchmark: what one part of a model costs and how good it is."""

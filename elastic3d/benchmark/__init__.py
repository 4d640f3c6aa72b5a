"""Speed and fidelity of elastic models, beside what a sceptic would do instead. See docs/benchmark.md."""

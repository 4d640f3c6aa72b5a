"""Every configuration dataclass, one file a topic. The library reads these; only the scripts know hydra."""

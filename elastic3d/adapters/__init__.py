"""Block families, each adapted to the routing protocol."""

"""How a mesh is scored."""

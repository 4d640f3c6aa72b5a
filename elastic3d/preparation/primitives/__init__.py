"""Shapes composed by program: everyday things and abstract compositions, each from its seed alone."""

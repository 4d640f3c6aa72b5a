"""Fields, surfaces and meshes."""

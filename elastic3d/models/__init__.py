"""Base models. They know nothing of routers."""

"""The errors a user of the package can meet, under the name by which callers import them."""

from elastic3d.utils.errors import NoSurfaceError, UserError

__all__ = ["NoSurfaceError", "UserError"]

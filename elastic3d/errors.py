"""The errors a user of the package can meet."""


class UserError(ValueError):
    """Something the user gave can't be used; the message is one sentence that names the value and the expectation."""


class NoSurfaceError(UserError):
    """A field has no crossing of its iso level, so there is no surface to extract."""

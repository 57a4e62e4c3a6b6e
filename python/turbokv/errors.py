"""The one exception that users see."""


class TurbokvError(Exception):
    """Something the user can act on. The message names the cause and the fix; the command prints it and exits 1."""

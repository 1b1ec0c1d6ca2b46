"""The one exception that stands for a mistake of the user's, not of the program's."""


class UserError(Exception):
    """A clear one-line message for the person at the keyboard; the command line prints it and exits 2."""

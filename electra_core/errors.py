"""The exceptions that stand for a mistake of the user's, not of the program's."""


class UserError(Exception):
    """A clear one-line message for the person at the keyboard; the command line prints it and exits 2."""


class AnotherRankFailed(UserError):
    """A user's error that another process of the run has found, and says."""

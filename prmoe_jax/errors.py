"""The errors a user is meant to read: one line on stderr, no traceback."""


class UserError(Exception):
    """Input that cannot be used as given; the message says what, the numbers and the fix.

    The command line prints it on one line and exits with code 2.
    """

    exit_code = 2


class TrainingStopped(UserError):
    """A run that cannot go on (a loss that is not finite, a disk that is full).

    The command line prints it on one line and exits with code 1: the command was
    right, the run was not.
    """

    exit_code = 1

"""The error a user can mend: one sentence that says what was given and what is allowed."""


class InputError(ValueError):
    """An input that msfp cannot use; the command line prints the message and exits with code 2."""

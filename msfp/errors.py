"""The error a user can mend: one sentence that says what was given and what is allowed."""


class InputError(ValueError):
    """Something given to msfp is not usable; the command line prints it and exits with code 2."""

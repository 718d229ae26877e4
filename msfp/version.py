"""The version of both packages, in one place."""

__version__ = "0.3.0"

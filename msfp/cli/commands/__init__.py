"""The commands of `msfp`, one file each: `add` describes the arguments, `run` does the work.

A command imports its dependencies when it runs, so that help and usage errors appear at once.
"""

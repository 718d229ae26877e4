"""The commands of `msfp`, one file each: `add` describes the arguments, `run` does the work.

What a command needs is imported when it runs, so that help and mistyped arguments do not wait.
"""

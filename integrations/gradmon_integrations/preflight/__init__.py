"""The check before the first step, on the command line."""

"""Sinks that need another project; import the one you use from its own module."""

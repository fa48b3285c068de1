"""Benchmarks: each prints a table, and with --write puts it on a page of docs/."""

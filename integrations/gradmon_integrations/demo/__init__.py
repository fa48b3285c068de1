"""The command `gradmon demo`: two runs side by side, one of them in trouble."""

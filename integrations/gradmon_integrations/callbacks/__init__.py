"""A monitor in one line, whichever trainer: a module for each, of which only that one imports the trainer."""

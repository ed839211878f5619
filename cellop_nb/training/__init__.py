"""One training loop, its callbacks, and the two trainers."""

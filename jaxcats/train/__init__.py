"""The train command and what it runs: experiment, loop, drivers, features, lr_finder, checkpoint; start at loop.py."""

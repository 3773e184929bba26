"""The training step and loop, evaluation, devices and processes."""

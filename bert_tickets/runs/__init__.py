"""The run directory: written, resumed, verified."""

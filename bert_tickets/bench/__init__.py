"""Measure the speed of training, beside a port of the released loop."""

"""Measure speed and check correctness on a device, in comparison with the released loop."""

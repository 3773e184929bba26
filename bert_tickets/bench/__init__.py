"""Speed and correctness on a device, beside the released loop."""

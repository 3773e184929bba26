"""Masks, and how they are chosen and compared."""

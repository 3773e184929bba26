"""Tickets as Hugging Face folders."""

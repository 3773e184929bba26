"""Results, tables and figures of finished runs."""

"""Timing a backend the way llama-bench does: what `refimpl bench` runs."""

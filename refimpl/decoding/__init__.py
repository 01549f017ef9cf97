"""Turning a backend into text: caches, sampling, speculation, and the loop that joins them."""

"""Exact NumPy reference and CPU inference for Step 3.5 Flash."""

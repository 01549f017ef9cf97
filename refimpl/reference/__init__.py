"""The mathematics of Step 3.5 Flash in plain NumPy, one idea a file.

Reading order: `norm`, `rope`, `attention`, `ffn`, `moe`, `block`, `mtp`, `model`. Arithmetic
precision is chosen by `numerics.Numerics`, known mistakes of other implementations can be
switched on through `variant.Variant`, and `trace.Trace` counts and records what a run does.
"""

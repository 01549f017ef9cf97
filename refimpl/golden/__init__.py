"""Golden outputs: what a run computes at every layer, written down and compared."""

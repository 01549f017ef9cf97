"""Hardware cost model for Step 3.5 Flash: memory, bandwidth, tokens per second."""

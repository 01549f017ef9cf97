"""The published claims about Step 3.5 Flash, each computed by the cost model."""

"""Validates the cost model against real runs and draws the comparison."""

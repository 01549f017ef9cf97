"""Runs that other tools measured: one module for each tool, recognised by content."""

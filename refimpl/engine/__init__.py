"""The fast CPU engine: quantised blocks used in place from the memory map."""

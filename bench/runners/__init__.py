"""Engines that `bench` drives, all behind one interface (`bench.runners.base`)."""

"""Benchmarks: every variant in one run, interleaved; medians, CPU-seconds, and memory in fresh processes."""

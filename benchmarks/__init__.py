"""Benchmarks of dcp_fast against torch's own loader and against what the machine can do."""

"""What tests/run_gpu consists of: the standard library only, as nothing is installed where it runs."""

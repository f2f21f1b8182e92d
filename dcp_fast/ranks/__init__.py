"""What all ranks of a process group do together."""

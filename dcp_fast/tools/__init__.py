"""The command line, and what it is a front for."""

"""The metadata of a checkpoint: read without running what it says, and made into objects only where it is looked at."""

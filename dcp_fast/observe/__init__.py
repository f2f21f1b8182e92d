"""What a load tells of itself: the report of what it did, and its timeline."""

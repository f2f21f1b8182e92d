"""From boxes of stored chunks to destinations in memory: what the native engine is told, and what torch has to do."""

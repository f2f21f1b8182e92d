"""Values of bytes entries: unpickled without running what they name."""

"""Media to bytes: HTTP, local files, data URLs."""

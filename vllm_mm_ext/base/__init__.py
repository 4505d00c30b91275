"""What every other package may use: freed memory, concurrent work, files that processes share."""

"""What every room may use: freed memory, concurrent work, files that processes share."""

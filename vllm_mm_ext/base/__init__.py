"""What every room may use: memory that goes back to the system, concurrent work, files shared by processes."""

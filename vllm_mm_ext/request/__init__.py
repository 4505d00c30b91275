"""What one request asks for, what it is given, and what it is told."""

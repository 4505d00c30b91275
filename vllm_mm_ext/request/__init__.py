"""What a request asks, what becomes of its media, and what its answer reports of that."""

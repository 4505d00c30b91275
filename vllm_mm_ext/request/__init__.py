"""What a request asks for, what its media become, and what the answer reports about them."""

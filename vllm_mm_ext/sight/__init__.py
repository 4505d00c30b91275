"""What an operator sees of a running server; free of vLLM and torch."""

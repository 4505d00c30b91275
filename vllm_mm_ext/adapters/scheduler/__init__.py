"""The scheduler that prepares each step of vLLM's own."""

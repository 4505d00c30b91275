"""Load figures between vLLM and the quality controller."""

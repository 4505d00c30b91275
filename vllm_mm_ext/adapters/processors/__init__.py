"""Multimodal processors, one module per model family."""

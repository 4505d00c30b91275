"""vLLM's multimodal processors, extended: a module per model family, and what families share."""

"""Pure decisions over plain values; nothing here knows vLLM."""

"""KV blocks that know what they hold, inside vLLM's block pool."""

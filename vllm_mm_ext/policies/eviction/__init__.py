"""Cost-aware eviction, shared by the encoder cache and the KV blocks, and traces to judge it by."""

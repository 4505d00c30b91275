"""KV blocks that know which media they hold: what stays cached, and what is evicted first."""

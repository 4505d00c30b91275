"""KV blocks that know what they hold: which media stay cached, and what goes first."""

"""Everything that imports vLLM: each module turns what a policy decides into what vLLM does."""

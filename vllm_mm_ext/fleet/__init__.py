"""Several vLLM servers behind a router: who gets a request, and what a fleet would do; pure."""

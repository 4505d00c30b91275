"""Quality under budgets and load: pure policies, and one adapter for vLLM's load figures."""

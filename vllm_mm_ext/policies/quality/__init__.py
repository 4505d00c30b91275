"""What videos get under token budgets and load: pure policies, and what ties them to vLLM."""

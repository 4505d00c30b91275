"""Order, budgets and encoder plan of an engine step."""

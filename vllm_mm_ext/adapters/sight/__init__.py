"""What an operator sees and does while a server runs: metrics, the page, takedowns."""

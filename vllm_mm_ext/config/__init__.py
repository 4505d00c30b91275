"""The one typed configuration: what an operator and a request may set."""

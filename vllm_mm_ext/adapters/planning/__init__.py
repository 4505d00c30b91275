"""Reads off vLLM's model classes and processors what the planner needs to know of a model."""

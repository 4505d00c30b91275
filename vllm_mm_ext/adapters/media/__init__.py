"""The front-end behind vLLM's media connector and video loader."""

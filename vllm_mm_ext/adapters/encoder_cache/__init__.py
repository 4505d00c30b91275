"""Encoder outputs kept between requests, behind vLLM's interfaces."""

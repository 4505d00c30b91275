"""Measures what work costs on this machine, through a real server: for ``vllm-mm calibrate``."""

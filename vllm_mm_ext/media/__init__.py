"""Bytes to sampled frames and waveforms. Everything a decode worker imports lives here,
so nothing at import time may need torch or vLLM."""

"""Bytes to frames and waveforms in worker processes."""

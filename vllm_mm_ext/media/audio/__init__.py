"""Waveforms and sound tracks."""

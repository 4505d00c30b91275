"""Fewer tokens per video, counted before encoding.

``scores``, ``select`` and ``positions`` are numpy and run with the processor: which tokens stay,
how many and where they stand is known before the encoder runs. ``reduce`` is torch and runs on the
encoder's output.
"""

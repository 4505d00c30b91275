"""Training of composer checkpoints: a synthetic generator of clips and questions, and the trainer.

Plain PyTorch and transformers; vLLM is not needed.
"""

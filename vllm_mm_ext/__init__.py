"""First-class video and audio serving for vLLM, as a plugin.

This module stays empty of imports on purpose: decode workers import
``vllm_mm_ext.media`` and must not pull in torch or vLLM.
"""

__version__ = "0.1.0"

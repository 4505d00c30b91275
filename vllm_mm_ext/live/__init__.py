"""Live sessions over the OpenAI Realtime protocol: codec, state, hearing, seeing. Pure.

Nothing here knows sockets, event loops or vLLM; ``adapters/live`` has these.
"""

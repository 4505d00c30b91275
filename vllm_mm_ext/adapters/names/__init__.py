"""The vLLM names each feature relies on, checked before the feature is used."""

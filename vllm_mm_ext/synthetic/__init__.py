"""Pictures and sound made by code and encoded with PyAV, for training and tests."""

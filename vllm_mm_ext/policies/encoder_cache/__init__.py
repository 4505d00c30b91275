"""Which encoder outputs stay on the device and in host memory."""

"""The composer: the reference architecture that gives video and sound to a text model."""

"""The composer: video and audio for any text model."""

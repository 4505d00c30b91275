"""Live sessions: sockets, the engine, and what joins them. ``live/`` has the rest."""

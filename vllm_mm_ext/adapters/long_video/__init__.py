"""Chat completions about long videos: windows and notes as internal requests to the engine."""

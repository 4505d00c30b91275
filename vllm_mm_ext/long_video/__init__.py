"""Questions about hours of video: windows, notes about them, and the strategies that answer."""

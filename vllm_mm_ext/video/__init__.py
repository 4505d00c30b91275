"""A video as segments: where the video is cut, what each segment is, how many tokens it takes."""

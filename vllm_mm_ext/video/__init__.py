"""A video as segments: where it is cut, what each segment is, how many tokens it takes."""

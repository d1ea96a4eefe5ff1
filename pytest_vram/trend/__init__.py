"""Record peaks in sessions, compare them along the commits of the repository, draw them, and bisect a growth."""

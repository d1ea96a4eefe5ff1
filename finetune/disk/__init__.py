"""What a run keeps on disk: files that survive a crash, checkpoints, logs, and what a resumed run must match."""

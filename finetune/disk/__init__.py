"""What a run keeps on disk: files that survive a crash, checkpoints, logs, and the facts a resumed run must match."""

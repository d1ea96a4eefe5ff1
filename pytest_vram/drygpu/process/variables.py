"""Environment variables that carry a command's wishes into the processes below it."""

RECORD_VARIABLE = "PYTEST_VRAM_RECORD"
"""Names the folder where each process leaves its figures when it ends; not set: it leaves none."""

SNAPSHOT_VARIABLE = "PYTEST_VRAM_SNAPSHOT"
"""Names the file for torch's memory history; not set: none is recorded."""

TIMELINE_VARIABLE = "PYTEST_VRAM_TIMELINE"
"""Set: memory over time is recorded, and left with the figures."""

EXIT_SUFFIX = ".exit"
"""Of the file beside a process's record into which the stub library writes the exit code."""

PROCESSES_VARIABLE = "PYTEST_VRAM_PROCESSES"
"""Names the folder where each process below a measured test leaves its figures; ``native/live.c`` reads it too."""

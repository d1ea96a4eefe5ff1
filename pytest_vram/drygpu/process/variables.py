"""Environment variables through which a command tells its child processes what to record."""

RECORD_VARIABLE = "PYTEST_VRAM_RECORD"
"""The folder into which each process writes its figures when it ends. If it is not set, none are written."""

CUDNN_VARIABLE = "PYTEST_VRAM_CUDNN"
"""``off``: the installed cuDNN is not asked for its workspaces, which then count as 0 bytes, or are estimated."""

SNAPSHOT_VARIABLE = "PYTEST_VRAM_SNAPSHOT"
"""The file for torch's memory history. If it is not set, no history is recorded."""

TIMELINE_VARIABLE = "PYTEST_VRAM_TIMELINE"
"""If it is set, memory over time is recorded and written with the figures."""

EXIT_SUFFIX = ".exit"
"""The suffix of the file next to a process's record, into which the stub library writes the exit code."""

SIGNAL_SUFFIX = ".signal"
"""The suffix of the file, named after a process, into which the process that waits for it writes the signal that ended
it; ``native/exit.c`` does that."""

PROCESSES_VARIABLE = "PYTEST_VRAM_PROCESSES"
"""The folder into which each process below a measured test writes its figures; ``native/live.c`` reads it too."""

ROWS_VARIABLE = "PYTEST_VRAM_ROWS"
"""How many words the longest rows have that replace the program's data sets. If it is not set, none is replaced."""

DATA_VARIABLE = "PYTEST_VRAM_DATA"
"""JSON: the files that replace data sets of the hub, by the data set's name."""

MODELS_VARIABLE = "PYTEST_VRAM_MODELS"
"""JSON: the names of the hub's models that have a stand-in."""

ROWS_FILE = "rows.txt"
"""The file, in the folder of the records, that names each data set whose rows were replaced, one a line."""

"""The code that runs in a process with a dry GPU, from its start to its end."""

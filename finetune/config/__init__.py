"""The settings of a run, the YAML file that holds them, and the checks of their values."""

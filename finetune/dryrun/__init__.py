"""``--dry-run`` and ``--fit``: the memory of a run, measured by taking its steps."""

"""``--dry-run`` and ``--fit``: measure the memory of a run by taking its steps."""

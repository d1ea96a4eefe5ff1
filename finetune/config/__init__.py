"""What a run is told: its settings, the YAML file that holds them, and what each setting may be."""

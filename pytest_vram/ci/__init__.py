"""What a CI job does with the budgets: measure the change and its base, annotate lines, and comment on the change."""

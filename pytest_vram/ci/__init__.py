"""The steps of a CI job: measure a change and its base, annotate lines, and comment on the pull request."""

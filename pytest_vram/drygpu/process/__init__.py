"""What happens in a process that runs on a dry GPU, from its start to its end."""

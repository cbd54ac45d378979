"""Worker processes: groups, their protocol, and the locks on GPUs."""

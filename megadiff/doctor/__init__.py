"""What this machine and this run description can do together, and what is wrong, before any job is queued."""

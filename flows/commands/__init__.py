"""What the commands of `cohort` do; one module per kind of work, imported when one of its commands is called."""

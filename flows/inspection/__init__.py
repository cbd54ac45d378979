"""Looking at what ran: runs, steps, artifacts, what differs, what another setting would have changed."""

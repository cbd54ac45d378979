"""A remote store that several machines share, and its local cache."""

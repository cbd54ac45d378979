"""What lies in a store, who uses it, and what may go."""

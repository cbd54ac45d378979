"""What the lines of Algorithm 1 call."""

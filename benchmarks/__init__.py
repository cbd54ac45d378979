"""Speed, memory and scale, side by side with peers; each benchmark prints ratios."""

"""From raw text to indexed data sets: used by the tools, not by training."""

"""What decides a mixture of domains: statistics, objectives, Group DRO, the reference."""

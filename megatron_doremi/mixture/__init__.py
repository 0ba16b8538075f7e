"""Domain mixtures: controllers, statistics by domain, objectives and the reference model."""

"""Group DRO over domains: weights, losses, the schedule and the engine that runs it."""

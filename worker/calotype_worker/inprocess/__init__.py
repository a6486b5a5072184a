"""The engine without a queue: the classes of the founding document."""

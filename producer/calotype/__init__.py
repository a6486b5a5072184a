"""Calotype's producer side."""

"""Tiny pipelines of many classes: real networks with random weights."""

"""Pipelines of many classes, each with requests that run together and alone."""

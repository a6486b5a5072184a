"""What `calotype gc` does: removes objects, and index entries in Redis, that no record refers to any more."""

from calotype.gc.bucket_identity import GcRefused
from calotype.gc.collector import Collector
from calotype.gc.report import Kind, Report

__all__ = ["Collector", "GcRefused", "Kind", "Report"]

"""Samplers as tables of small matrices, so that rows with different samplers share one step."""

from calotype_worker.sampling.samplers import SAMPLERS, make_scheduler
from calotype_worker.sampling.table import SamplerTable, TableCache, build_table

__all__ = ["SAMPLERS", "SamplerTable", "TableCache", "build_table", "make_scheduler"]

"""Samplers as tables of small matrices, so that rows with different samplers share one step."""

from calotype_worker.sampling.samplers import SAMPLERS, make_scheduler
from calotype_worker.sampling.table import SamplerTable, TableCache, build_table
from calotype_worker.sampling.trajectory import Trajectory

__all__ = ["SAMPLERS", "SamplerTable", "TableCache", "Trajectory", "build_table", "make_scheduler"]

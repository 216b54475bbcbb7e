"""The plan rendered by DALI: the only place that imports it."""

from pipelines.dali.graph import DTYPES, Graph
from pipelines.dali.instance_graph import InstanceGraph
from pipelines.dali.renderer import Renderer, build

__all__ = ["DTYPES", "Graph", "InstanceGraph", "Renderer", "build"]

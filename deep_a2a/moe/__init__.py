"""The MoE layer: dispatch and combine as differentiable functions, SwiGLU experts, and a ready `MoELayer`."""

from deep_a2a.moe.autograd import BF16, Dispatched, RowFormat, combine, dispatch
from deep_a2a.moe.experts import RoutedExperts, SharedExpert, swiglu
from deep_a2a.moe.layer import MoELayer, ParameterSplit, split_parameters

__all__ = [
    "BF16",
    "Dispatched",
    "MoELayer",
    "ParameterSplit",
    "RoutedExperts",
    "RowFormat",
    "SharedExpert",
    "combine",
    "dispatch",
    "split_parameters",
    "swiglu",
]

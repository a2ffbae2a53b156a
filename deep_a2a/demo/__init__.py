"""The main job: a small MoE language model, its experts spread over processes that stand for ranks of several nodes."""

from deep_a2a.demo.config import DemoConfig
from deep_a2a.demo.launch import main

__all__ = ["DemoConfig", "main"]

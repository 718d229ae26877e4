"""Small pipelines of random weights, of every kind that diffusers has."""

from .case import PipelineCase
from .guided import CASES as GUIDED
from .images import CASES as IMAGES
from .media import CASES as MEDIA

CASES: dict[str, PipelineCase] = IMAGES | GUIDED | MEDIA

__all__ = ["CASES", "PipelineCase"]

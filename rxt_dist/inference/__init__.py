"""Answering turn by turn with a memory that is written after each answer.

from rxt_dist.inference import Assistant
"""

from rxt_dist.inference.assistant import Assistant
from rxt_dist.inference.events import Answer, Token, WriteStarted, Written
from rxt_dist.inference.prompts import Prompt
from rxt_dist.inference.sampling import Sampling
from rxt_dist.inference.session import Session

__all__ = ["Answer", "Assistant", "Prompt", "Sampling", "Session", "Token", "WriteStarted", "Written"]

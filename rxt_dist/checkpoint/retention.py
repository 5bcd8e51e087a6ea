"""Which checkpoints stay: the newest, milestones and the best one, by what their manifests say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MIN_KEEP = 2


@dataclass(frozen=True)
class Retention:
    """What pruning leaves.

    keep: newest checkpoints, at least 2, so that one damaged on disk costs one interval.
    milestone_tokens: of every so many trained tokens the first checkpoint stays for ever; 0: none does.
    keep_best: whether the one with the lowest mean evaluation loss stays.
    """

    keep: int
    milestone_tokens: int = 0
    keep_best: bool = False

    def __post_init__(self) -> None:
        if self.keep < MIN_KEEP:
            raise ValueError(f"keep is {self.keep}; at least {MIN_KEEP} checkpoints must stay")

    def choose(self, sound: Mapping[int, Mapping[str, Any]]) -> dict[int, str]:
        """Why a checkpoint stays ('newest', 'milestone' or 'best'), by its step; those not named may go.

        Suspect checkpoints are counted as nothing. Those newer than the last counted one stay until it is passed.

        Args:
            sound: what the manifests of whole checkpoints say (`meta`), by step.
        """
        trusted = {step: meta for step, meta in sorted(sound.items()) if not meta.get("suspect")}
        reasons: dict[int, str] = {}
        losses = {step: loss for step, meta in trusted.items() if (loss := _loss(meta)) is not None}
        if self.keep_best and losses:
            reasons[min(losses, key=lambda step: (losses[step], step))] = "best"
        milestones: set[int] = set()
        for step, meta in trusted.items():
            reached = int(meta.get("tokens", 0)) // self.milestone_tokens if self.milestone_tokens else 0
            if reached and reached not in milestones:
                milestones.add(reached)
                reasons[step] = "milestone"
        return reasons | dict.fromkeys(list(trusted)[-self.keep :], "newest")


def _loss(meta: Mapping[str, Any]) -> float | None:
    """Mean evaluation loss near a checkpoint, if there was one."""
    evaluation = meta.get("evaluation")
    return None if evaluation is None else float(evaluation["loss"])

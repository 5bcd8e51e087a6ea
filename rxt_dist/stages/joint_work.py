"""How much joint pre-training computes."""

from __future__ import annotations

from rxt_dist.config.run import RunConfig
from rxt_dist.config.stages import JointConfig
from rxt_dist.model.flops import flops_by_part
from rxt_dist.stages.work import Work


class JointWork:
    """See `Arithmetic`."""

    @classmethod
    def flops(cls, run: RunConfig, work: Work) -> int:
        """See `Arithmetic.flops`."""
        return sum(cls.flops_by_part(run, work).values())

    @classmethod
    def flops_by_part(cls, run: RunConfig, work: Work) -> dict[str, int]:
        """See `Arithmetic.flops_by_part`."""
        return flops_by_part(run.model, work.tokens, work.pairs, int(work.counts["mlm"]), run.stage.parts())

    @classmethod
    def expected_work(cls, run: RunConfig, tokens: int, seq_len: int) -> Work:
        """See `Arithmetic.expected_work`."""
        assert isinstance(run.stage, JointConfig)
        return Work(tokens, tokens * seq_len, {"mlm": round(tokens * run.stage.mlm_probability)})

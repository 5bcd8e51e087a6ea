"""The whole Reactive Transformer: one embedding, encoder, MLM head, decoder, language-model head, memory attention."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn

from rxt_dist.config.model import ModelConfig, PartName
from rxt_dist.model.decoder import Decoder
from rxt_dist.model.encoder import Encoder
from rxt_dist.model.experts import ExpertStack
from rxt_dist.model.heads import LanguageModelHead, MaskedLanguageModelHead
from rxt_dist.model.memory import MemoryAttention
from rxt_dist.model.moe import SharedExperts


class ReactiveTransformer(nn.Module):
    """Parts of a system; a stage builds and calls those it needs. Encoder and decoder share `embedding`.

    An interaction flows: embedding -> decoder (reading the memory) -> lm_head; afterwards
    embedding -> encoder -> memory_attention, which returns the next memory. Memory is passed in and out.

    Args:
        parts: names of the parts to build; None: all that the configuration describes.
        recompute: recompute each layer of encoder and decoder in the backward pass instead of storing it.

    matrices: names of the parameters that are matrices or stacks of them: weights of linear maps, experts, embeddings.
        All others are norms, biases of any shape, and scalar gates of the memory. Known from the modules as they are
        built, since an engine may put others in their places.
    """

    def __init__(self, config: ModelConfig, parts: Collection[PartName] | None = None, recompute: bool = False) -> None:
        super().__init__()
        self.config = config
        built = described_parts(config) if parts is None else parts
        size = config.dim, config.vocab_size
        self.embedding = nn.Embedding(config.vocab_size, config.dim) if "embedding" in built else None
        self.decoder = Decoder(config, recompute) if "decoder" in built else None
        self.lm_head = LanguageModelHead(*size) if "lm_head" in built else None
        self.encoder = None
        if "encoder" in built:
            assert config.encoder is not None
            self.encoder = Encoder(config, config.encoder, recompute)
        self.mlm_head = MaskedLanguageModelHead(*size) if "mlm_head" in built else None
        self.memory_attention = None
        if "memory_attention" in built:
            assert config.memory_attention is not None
            self.memory_attention = MemoryAttention(config, config.memory_attention)
        self.matrices = frozenset(_matrices(self))


def described_parts(config: ModelConfig) -> tuple[PartName, ...]:
    """The parts that a configuration describes, in the order of the network."""
    with_encoder = ("encoder", "mlm_head") if config.encoder else ()
    with_memory = ("memory_attention",) if config.memory_attention else ()
    return ("embedding", "decoder", "lm_head", *with_encoder, *with_memory)


def _matrices(model: nn.Module) -> Iterator[str]:
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            yield f"{path}.weight"
        elif isinstance(module, ExpertStack | SharedExperts):
            yield f"{path}.gate_up_proj"
            yield f"{path}.down_proj"

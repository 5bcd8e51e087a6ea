"""The whole Reactive Transformer: one embedding, encoder, MLM head, decoder, language-model head, memory attention."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from rxt_dist.config.model import ModelConfig
from rxt_dist.model.decoder import Decoder
from rxt_dist.model.encoder import Encoder
from rxt_dist.model.experts import ExpertStack
from rxt_dist.model.heads import LanguageModelHead, MaskedLanguageModelHead
from rxt_dist.model.memory import MemoryAttention
from rxt_dist.model.moe import SharedExperts


class ReactiveTransformer(nn.Module):
    """All parts of a system; a stage calls those it needs. Encoder and decoder share `embedding`.

    An interaction flows: embedding -> decoder (reading the memory) -> lm_head; afterwards
    embedding -> encoder -> memory_attention, which returns the next memory. Memory is passed in and out.

    matrices: names of the parameters that are matrices or stacks of them: weights of linear maps, experts, embeddings.
        All others are norms, biases of any shape, and scalar gates of the memory. Known from the modules as they are
        built, since an engine may put others in their places.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.decoder = Decoder(config)
        self.lm_head = LanguageModelHead(config.dim, config.vocab_size)
        self.encoder = Encoder(config, config.encoder) if config.encoder else None
        self.mlm_head = MaskedLanguageModelHead(config.dim, config.vocab_size) if config.encoder else None
        memory = config.memory_attention
        self.memory_attention = MemoryAttention(config, memory) if memory else None
        self.matrices = frozenset(_matrices(self))


def _matrices(model: nn.Module) -> Iterator[str]:
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            yield f"{path}.weight"
        elif isinstance(module, ExpertStack | SharedExperts):
            yield f"{path}.gate_up_proj"
            yield f"{path}.down_proj"

"""The whole Reactive Transformer: one embedding, encoder, MLM head, decoder, language-model head, memory attention."""

from __future__ import annotations

from torch import nn

from rxt_dist.config.model import ModelConfig
from rxt_dist.model.decoder import Decoder
from rxt_dist.model.encoder import Encoder
from rxt_dist.model.heads import LanguageModelHead, MaskedLanguageModelHead
from rxt_dist.model.memory import MemoryAttention


class ReactiveTransformer(nn.Module):
    """All parts of a system; a stage calls those it needs. Encoder and decoder share `embedding`.

    An interaction flows: embedding -> decoder (reading the memory) -> lm_head; afterwards
    embedding -> encoder -> memory_attention, which returns the next memory. Memory is passed in and out.
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

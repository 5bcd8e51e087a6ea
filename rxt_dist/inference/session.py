"""A conversation: its memory, its generator, how many turns it has had. Saved as one safetensors file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rxt_dist.config.model import ModelConfig
from rxt_dist.errors import ConfigError, DataError
from rxt_dist.files import access_errors, require_file_place, write_atomic
from rxt_dist.model.memory import initial_memory

_FORMAT = "rxt-session-1"


@dataclass(frozen=True)
class Identity:
    """Which model a memory means something to.

    model: digest of its weights; tokenizer: fingerprint; shape: [L, 1, S, D] of its memories.
    """

    model: str
    tokenizer: str
    shape: tuple[int, ...]


class Session:
    """One conversation with one model.

    The memory is a value: a write gives the next one, and a fork shares what is there. One interaction at a time; the
    write of the last one is waited for by whatever needs the memory.

    turn: interactions that were begun to be written.
    """

    def __init__(self, identity: Identity, memory_L1SD: Tensor, generator: torch.Generator, turn: int = 0) -> None:
        self.identity = identity
        self.generator = generator
        self.turn = turn
        self._memory = memory_L1SD
        self._moved: tuple[float, ...] = (0.0,) * len(memory_L1SD)
        self._pending: tuple[Future[Tensor], int] | None = None
        self._answering = False

    @staticmethod
    def new(identity: Identity, config: ModelConfig, seed: int, device: torch.device) -> Session:
        """A memory N(0, 1), drawn from the seed, as are the tokens that are sampled later.

        Raises:
            ConfigError: a seed that no generator takes.
        """
        if not 0 <= seed < 2**63:
            raise ConfigError(f"The seed is {seed}, but it must be from 0 to 2^63 - 1.")
        generator = torch.Generator().manual_seed(seed)
        return Session(identity, initial_memory(config, 1, generator).to(device), generator)

    @property
    def memory(self) -> Tensor:
        """The memory, float32 [L, 1, S, D]; waits for a write.

        Raises:
            Whatever ended the write, once: the memory then is as it was before the interaction.
        """
        if self._pending is not None:
            (future, row), self._pending = self._pending, None
            try:
                written = future.result()[:, row : row + 1]
            except BaseException:
                self.turn -= 1
                raise
            self._moved = _moved(self._memory, written)
            self._memory = written
        return self._memory

    @property
    def moved(self) -> tuple[float, ...]:
        """How far the last write moved each layer's memory: |new - old| / |old|. Waits for it."""
        assert self.memory is not None
        return self._moved

    @contextmanager
    def answering(self) -> Iterator[None]:
        """For an interaction, from its query to the beginning of its write.

        Raises:
            ConfigError: another one is being answered: what it will be asked next depends on a memory that is not yet.
        """
        if self._answering:
            raise ConfigError(
                "This session is being asked something already, and its memory is written only after the answer: read "
                "or close that answer first, or ask a fork of the session."
            )
        self._answering = True
        try:
            yield
        finally:
            self._answering = False

    def hand_over(self, written: Future[Tensor], row: int) -> None:
        """The memory will be this row of what is being written; counts a turn."""
        self._pending = written, row
        self.turn += 1

    def fork(self) -> Session:
        """Another session that goes on from here by itself; waits for a write."""
        generator = torch.Generator()
        generator.set_state(self.generator.get_state())
        return Session(self.identity, self.memory, generator, self.turn)

    def save(self, path: Path) -> None:
        """Write all of it into one file; waits for a write.

        Raises:
            ConfigError, DiskError: the file cannot be written; what was there stays.
        """
        require_file_place(path)
        tensors = {"memory": self.memory.contiguous().cpu(), "generator": self.generator.get_state()}
        told = {
            "format": _FORMAT,
            "model": self.identity.model,
            "tokenizer": self.identity.tokenizer,
            "turn": str(self.turn),
        }
        with access_errors(path, "The session goes on; it was not saved."):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, save(tensors, {**told, "digest": _digest(tensors, told)}))

    @staticmethod
    def load(path: Path, identity: Identity, device: torch.device) -> Session:
        """Read a session of this model.

        Raises:
            DataError: there is none, it is damaged, or it is of another model or tokenizer.
        """
        tensors, told = _read(path)
        if told.pop("digest", None) != _digest(tensors, told):
            raise DataError(f"The session {path} is damaged: its content has not the digest that it states.")
        for name, own in (("model", identity.model), ("tokenizer", identity.tokenizer)):
            if told.get(name) != own:
                raise DataError(
                    f"The session {path} is of another {name} ({str(told.get(name))[:12]}..., this one is "
                    f"{own[:12]}...), and its memory means nothing here. Load the {name} that it was saved with."
                )
        assert tuple(tensors["memory"].shape) == identity.shape, "a model's digest is of its memory's shape, too"
        generator = torch.Generator()
        generator.set_state(tensors["generator"])
        return Session(identity, tensors["memory"].to(device), generator, int(told["turn"]))


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise DataError(f"There is no session {path}. Save one first, or check the path.")
    try:
        with safe_open(path, "pt") as file:
            told = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is not a session: it cannot be read as safetensors ({error}).") from error
    if told.get("format") != _FORMAT or tensors.keys() != {"memory", "generator"}:
        raise DataError(f"{path} is not a session that this version wrote. Name a file that was saved from a chat.")
    return tensors, told


def _digest(tensors: dict[str, Tensor], told: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _moved(old_L1SD: Tensor, new_L1SD: Tensor) -> tuple[float, ...]:
    change_L = torch.linalg.vector_norm((new_L1SD - old_L1SD).flatten(1), dim=1)
    old_L = torch.linalg.vector_norm(old_L1SD.flatten(1), dim=1)
    return tuple((change_L / old_L.clamp_min(torch.finfo(old_L.dtype).tiny)).tolist())

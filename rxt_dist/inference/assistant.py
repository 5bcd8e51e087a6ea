"""A trained model that answers: the Python interface."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from rxt_dist.data.text import Text
from rxt_dist.errors import ConfigError, DataError
from rxt_dist.inference.events import Answer, Event, Reading, WriteStarted, Written
from rxt_dist.inference.generate import Row, answer, write
from rxt_dist.inference.load import load_network
from rxt_dist.inference.prompts import MODES, Prompt, system_instruction, told
from rxt_dist.inference.sampling import Sampling
from rxt_dist.inference.session import Identity, Session
from rxt_dist.model.reactive import ReactiveTransformer

PARTS = ("embedding", "decoder", "lm_head", "encoder", "memory_attention")


class Assistant:
    """A network, its tokenizer, and what they are known by.

    Decoder and encoder compute in the given type; the memory and the network that writes it are float32, since
    rounding would add up over the turns.

    Args:
        network: with float32 weights, in evaluation; it is the assistant's from here on.

    Raises:
        DataError: the network lacks a part, so that it cannot answer turn by turn.
    """

    def __init__(
        self,
        network: ReactiveTransformer,
        text: Text,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        missing = [part for part in PARTS if getattr(network, part) is None]
        if missing:
            raise DataError(
                f"Model '{network.config.name}' has no {', '.join(missing)} here, and without it cannot answer turn by "
                "turn. Name a run or export of a stage that trains the whole system."
            )
        self.config, self.text, self.device = network.config, text, torch.device(device)
        shape = (self.config.layers, 1, self.config.stm_slots, self.config.dim)
        self.identity = Identity(weights_digest(network), text.fingerprint, shape)
        self.network = network.eval().requires_grad_(False).to(self.device, dtype)
        assert network.memory_attention is not None
        network.memory_attention.float()

    @staticmethod
    def load(
        place: Path | str,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        tokenizer: Path | str | None = None,
    ) -> Assistant:
        """The assistant of a run's newest valid checkpoint, or of an export; see `load_network` for what is refused.

        Args:
            device: None: a GPU if there is one.
        """
        network, text = load_network(Path(place), None if tokenizer is None else Path(tokenizer))
        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return Assistant(network, text, chosen, dtype)

    def session(self, seed: int = 0, system: str | None = None) -> Session:
        """A new conversation. system: instructions that are written into its first memory."""
        session = Session.new(self.identity, self.config, seed, self.device)
        if system:
            self.write([session], [system_instruction(self.text, system)])
        return session

    def load_session(self, path: Path | str) -> Session:
        """A conversation that was saved; see `Session.load`."""
        return Session.load(Path(path), self.identity, self.device)

    def tell(self, session: Session, query: str, answer: str) -> None:
        """Write an interaction that took place elsewhere into the memory."""
        with session.answering():
            self.write([session], [told(self.text, query, answer)])

    def interact(self, session: Session, prompt: Prompt | str, sampling: Sampling | None = None) -> Iterator[Event]:
        """Answer one prompt: tokens, the mode first, then that the write began and that it is done.

        The write goes on in the background whether the iterator is read to its end or not. An iterator that is closed,
        or a Ctrl-C, before the answer is whole writes what was generated; an error leaves the memory as it was.

        Raises:
            ConfigError: the session is being asked something already, or is of another model.
            DataError: the prompt leaves no room for an answer.
        """
        for _, event in self.stream([session], [prompt], sampling):
            yield event

    def answer(
        self, sessions: Sequence[Session], prompts: Sequence[Prompt | str], sampling: Sampling | None = None
    ) -> list[Answer]:
        """Answer a prompt of each of several sessions, all at once; each as it would be alone.

        Raises:
            As `interact`; also ConfigError: a session stands there twice.
        """
        said: list[list[int]] = [[] for _ in sessions]
        for number, event in self.stream(sessions, prompts, sampling):
            if not isinstance(event, WriteStarted | Written):
                said[number].append(event.id)
        return [Answer.of(ids, self.text) for ids in said]

    def stream(
        self, sessions: Sequence[Session], prompts: Sequence[Prompt | str], sampling: Sampling | None = None
    ) -> Iterator[tuple[int, Event]]:
        """`interact` for several sessions at once: (number of the session, event)."""
        sampling = sampling or Sampling()
        asked = [Prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        ids = [prompt.ids(self.text, self.config.seq_len) for prompt in asked]
        with ExitStack() as stack:
            for session in sessions:
                stack.enter_context(session.answering())
            rows = [
                Row(of_prompt, MODES[prompt.mode], sampling, session.generator, self.text.controls)
                for of_prompt, prompt, session in zip(ids, asked, sessions, strict=True)
            ]
            memory_LBSD = self._memory(sessions)
            readings = [Reading(self.text) for _ in rows]
            try:
                for tokens in answer(self.network, memory_LBSD, rows):
                    for number, token in enumerate(tokens):
                        if token is not None:
                            yield number, readings[number].token(token)
            except (GeneratorExit, KeyboardInterrupt):
                if all(row.said for row in rows):
                    self.write(sessions, [row.written for row in rows])
                raise
            self.write(sessions, [row.written for row in rows])
        for number in range(len(sessions)):
            yield number, WriteStarted()
        for number, session in enumerate(sessions):
            moved = session.moved
            yield number, Written(session.turn, moved)

    def write(self, sessions: Sequence[Session], interactions: Sequence[Sequence[int]]) -> None:
        """Begin to write an interaction, as ids, into the memory of each session, in the background.

        Raises:
            DataError: one is longer than a row of the model.
        """
        for ids in interactions:
            if len(ids) > self.config.seq_len:
                raise DataError(
                    f"An interaction of {len(ids):,} tokens cannot be written into the memory: the model reads at most "
                    f"{self.config.seq_len:,}. Shorten it, or tell it in several turns."
                )
        memory_LBSD = self._memory(sessions)
        written: Future[Tensor] = Future()

        def work() -> None:
            try:
                written.set_result(write(self.network, memory_LBSD, interactions))
            except BaseException as error:  # it is told to whoever needs the memory next
                written.set_exception(error)

        # Not a daemon: a process that ends waits for it.
        threading.Thread(target=work, name="memory write").start()
        for row, session in enumerate(sessions):
            session.hand_over(written, row)

    def _memory(self, sessions: Sequence[Session]) -> Tensor:
        """[L, B, S, D]; waits for writes."""
        if any(session.identity != self.identity for session in sessions):
            raise ConfigError("This session is of another model, and its memory means nothing here: begin another one.")
        return torch.cat([session.memory for session in sessions], dim=1)


def weights_digest(network: ReactiveTransformer) -> str:
    """Hex sha256 of the parameters that answering needs, as they are: of whatever run or export they came from."""
    digest = hashlib.sha256()
    for name, parameter in sorted(network.named_parameters()):
        if name.split(".")[0] in PARTS:
            digest.update(f"{name}:{tuple(parameter.shape)};".encode())
            digest.update(parameter.detach().float().contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()

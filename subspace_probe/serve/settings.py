"""Where the server listens, who may ask, and how much."""

import ipaddress
from dataclasses import dataclass, field, fields
from typing import final

from subspace_probe.core.errors import ConfigError

MOST_INPUTS = 2048
"""Texts in one request that no setting can exceed; the schema says so."""
MOST_CHARACTERS = 1_000_000
"""Characters in one text that no setting can exceed."""


@final
@dataclass(frozen=True)
class ServerSettings:
    """Settings of the server. Memory held for requests is at most `max_requests` times `max_body_bytes`.

    Attributes:
        host: interface to listen on; only this machine by default.
        port: 0 picks a free one.
        token: what clients must send as `Authorization: Bearer TOKEN` or `x-api-key: TOKEN`; None asks for nothing.
        model_name: the name this server gives its guard.
        max_body_bytes: of one request, counted while it is read.
        max_inputs: texts in one request.
        max_characters: of one text.
        max_connections: open at the same time, at most 64 fewer than the process may open files; one more is closed.
        header_s: for a request's headers, from the connection's opening, or their first byte where it is kept alive.
        max_requests: under way at the same time; more are told to come back.
        max_batch: prompts in one visit to the model.
        max_wait_ms: for a batch to fill, from the arrival of its first prompt.
        queue_prompts: accepted and not yet answered; more are told to come back.
        timeout_s: for a request to arrive, and then for its answer.
        block_abstained: let LiteLLM's guardrail block a text on which the guard abstains, too.
        strict: answer with nothing that OpenAI's own answers do not have.
        log_prompts: write what was asked into the log.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = field(default=None, repr=False)
    model_name: str = "latent-guard"
    max_body_bytes: int = 1 << 20
    max_inputs: int = 256
    max_characters: int = 100_000
    max_connections: int = 2048
    header_s: float = 10.0
    max_requests: int = 1024
    max_batch: int = 32
    max_wait_ms: float = 4.0
    queue_prompts: int = 4096
    timeout_s: float = 60.0
    block_abstained: bool = False
    strict: bool = False
    log_prompts: bool = False

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self) if f.name.startswith(("max_", "header_", "queue_", "timeout_"))):
            if not getattr(self, name) > 0 and name != "max_wait_ms":
                raise ConfigError(f"{name} is {getattr(self, name)!r}. Give a number above 0.")
        if not self.max_wait_ms >= 0:
            raise ConfigError(f"max_wait_ms is {self.max_wait_ms!r}. Give 0 or more.")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"The port is {self.port}. Give one from 0 (any free one) to 65535.")
        if self.max_inputs > min(MOST_INPUTS, self.queue_prompts):
            raise ConfigError(
                f"max_inputs is {self.max_inputs}, and the most is {MOST_INPUTS}, and no more than the queue holds "
                f"({self.queue_prompts}): a request that never fits would be told to come back for ever."
            )
        if self.max_characters > MOST_CHARACTERS:
            raise ConfigError(f"max_characters is {self.max_characters}, and the most is {MOST_CHARACTERS}.")
        if self.token is not None and not (self.token and self.token.isascii() and self.token.isprintable()):
            raise ConfigError(
                "The token is empty or has characters that no HTTP header can carry. Use printable ASCII."
            )
        if self.token is not None and " " in self.token:
            raise ConfigError("The token has a space in it, which a bearer token cannot have.")
        if not self.model_name.strip():
            raise ConfigError("The model's name is empty. Clients ask for it by name: give one.")

    @property
    def local(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a host's name, or "" for every interface
            return False

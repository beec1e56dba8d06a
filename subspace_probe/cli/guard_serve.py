"""`subspace-probe guard serve`: a moderation server on a guard."""

import os
from pathlib import Path
from typing import Annotated

import typer

from subspace_probe.cli.guard_options import Foreign, GuardFolder, OwnModel, open_guard
from subspace_probe.cli.options import Backend, Device, Dtype, Template
from subspace_probe.core.errors import ConfigError, StoreError


def serve(
    folder: GuardFolder,
    host: Annotated[str, typer.Option(help="Interface to listen on; only this machine by default.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 picks a free one.", min=0, max=65535)] = 8000,
    token_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable with the token that clients must send.")
    ] = None,
    token_file: Annotated[Path | None, typer.Option(metavar="FILE", help="File with that token.")] = None,
    max_batch: Annotated[int, typer.Option(help="Prompts in one visit to the model.", min=1)] = 32,
    block_abstained: Annotated[
        bool,
        typer.Option(
            "--block-abstained/--no-block-abstained", help="Let LiteLLM's guardrail block what the guard abstains on."
        ),
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Answer with nothing that OpenAI's own answers do not have.")
    ] = False,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write what was asked into the log.")] = False,
    model: OwnModel = None,
    allow_model_mismatch: Foreign = False,
    device: Device = None,
    dtype: Dtype = "auto",
    backend: Backend = "native",
    template: Template = None,
) -> None:
    """Answer POST /v1/moderations as OpenAI's clients send it, until stopped; a page to try it is at /.

    A token is never given on the command line, where every user of the machine can read it.
    """
    from subspace_probe.serve.app import serve as start
    from subspace_probe.serve.settings import ServerSettings

    token = _token(token_env, token_file)
    settings = ServerSettings(
        host=host, port=port, token=token, max_batch=max_batch, block_abstained=block_abstained, strict=strict,
        log_prompts=log_prompts,
    )  # fmt: skip
    guard = open_guard(
        folder, model, device=device, dtype=dtype, backend=backend, template=template,
        allow_model_mismatch=allow_model_mismatch,
    )  # fmt: skip
    start(guard, settings)


def _token(env: str | None, file: Path | None) -> str | None:
    if env is not None and file is not None:
        raise ConfigError("Both --token-env and --token-file were given. Give one of them.")
    if env is not None:
        if not (found := os.environ.get(env, "").strip()):
            raise ConfigError(f"--token-env {env} was given, but that variable is not set, or empty. Set it.")
        return found
    if file is None:
        return None
    try:
        found = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"Cannot read the token from {str(file)!r}: {error}.") from None
    if not found:
        raise ConfigError(f"--token-file {file} is empty. Put the token there.")
    return found

"""`backends compare`, and `capture` run twice."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from typer.testing import Result

pytestmark = pytest.mark.slow

Cli = Callable[..., "Result"]


def test_the_backends_agree_on_a_users_model(cli: Cli, tiny: Path) -> None:
    result = cli("-q", "backends", "compare", "--model", tiny, "-p", "a b red", "-p", "one two three dog cat")
    assert result.exit_code == 0, result.output
    for part in ("read", "write", "gradient", "text", "resid_mid", "mlp_post", "nnsight", "transformer_lens"):
        assert part in result.stdout
    assert "They agree: the largest of" in result.stdout


def test_a_disagreement_is_said_and_ends_in_1(cli: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from subspace_probe.models.nns import NNsightModel

    call = NNsightModel._call

    def late(self: Any, state: Any, inputs: Any) -> Any:
        """A backend whose edits arrive at the wrong strength."""
        state.writes = {site: lambda x, ctx, edit=edit: 2 * edit(x, ctx) - x for site, edit in state.writes.items()}
        return call(self, state, inputs)

    monkeypatch.setattr(NNsightModel, "_call", late)
    result = cli("-q", "backends", "compare", "--model", tiny, "--layer", 1, "--details", "-p", "a b red")
    assert result.exit_code == 1, result.output
    assert "They do not agree" in result.stdout
    assert "L1.resid_post" in result.stdout
    assert "L0." not in result.stdout


def test_backends_are_listed(cli: Cli) -> None:
    result = cli("backends", "list")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in ("native", "transformer_lens", "nnsight"))


def test_a_capture_that_is_there_is_not_computed_again_and_another_is_refused(
    cli: Cli, tiny: Path, colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from subspace_probe.models.native import NativeModel

    command = ["-q", "capture", "--model", tiny, "--contrast", colours.name, "-o", "acts"]
    first = cli(*command)
    assert first.exit_code == 0, first.output

    call = NativeModel._call
    passes = list[int]()

    def counted(self: Any, state: Any, inputs: Any) -> Any:
        passes.append(len(inputs["input_ids"]))
        return call(self, state, inputs)

    monkeypatch.setattr(NativeModel, "_call", counted)
    again = cli(*command)
    assert again.exit_code == 0, again.output
    assert again.stdout == first.stdout
    assert sum(passes) <= 2  # loading checks the residual identities on a few tokens
    other = cli(*command, "--keep-as", "bfloat16")
    assert other.exit_code == 2
    assert "holds other activations: its dtype differ" in other.stderr
    elsewhere = cli(*command[:-1], "half", "--keep-as", "bfloat16", "--batch-tokens", 16)
    assert elsewhere.exit_code == 0, elsewhere.output
    assert "bfloat16" in elsewhere.stdout

"""What `sae_evaluation` says in words."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from subspace_probe.core.findings import Finding
from subspace_probe.core.sites import Site
from subspace_probe.studies.sae_evaluation_prompts import RESTORED


@runtime_checkable
class Settings(Protocol):
    """What the summary needs of the study's settings."""

    @property
    def attributes(self) -> tuple[str, ...]: ...
    @property
    def where(self) -> str: ...


def summary(
    model: str,
    site: Site,
    restored: float,
    findings: Sequence[Finding],
    tables: Mapping[str, list[dict[str, Any]]],
    config: Settings,
) -> list[str]:
    """The answer in a few sentences, each from the numbers it names.

    Args:
        restored: share of the answer that exchanging the whole state restores.
    """
    by_name = {finding.name: finding for finding in findings}
    learned = [row["dictionary"] for row in tables["interpretable"]]

    def figure(name: str) -> str:
        found = by_name[name]
        interval = f" [{found.interval.low:.2f}, {found.interval.high:.2f}]" if found.interval else ""
        return f"{found.estimate:.2f}{interval}"

    carries = f"carries the answer of {model}"
    if restored < RESTORED:
        carries = f"was asked for and does not carry the answer of {model}: its exchange restores {restored:.2f}"
    lines = [
        f"The state {site.short} at {config.where} {carries}; codes fitted to the attributes keep "
        f"{figure('sufficiency.supervised')} of the logit difference, mean codes "
        f"{figure('sufficiency.supervised_mean')}. "
        + "Reconstructions of autoencoders keep "
        + ", ".join(f"{figure(f'sufficiency.{arm}')} ({arm})" for arm in learned)
        + "."
    ]
    idle: list[str] = []
    for name in config.attributes:
        no_edit = next(row["no_edit"] for row in tables["edits"] if row["attribute"] == name)
        prefix, said = ("edit", "give the token of the whole patch in")
        if by_name[f"edit.{name}.supervised"].verdict == "not tested":
            prefix, said = (
                "closed",
                f"(the answer stays, {no_edit:.2f} agree without an edit) close of the KL to the patch",
            )
        if by_name[f"{prefix}.{name}.supervised"].verdict == "not tested":
            idle.append(name)
            lines.append(f"Changing {name} at this state changes nothing, even by the whole patch.")
            continue
        by_arm = ", ".join(f"{figure(f'{prefix}.{name}.{arm}')} ({arm})" for arm in learned)
        lines.append(
            f"Two features that change {name} {said} {figure(f'{prefix}.{name}.supervised')} with supervision, {by_arm}"
            + (f"; {no_edit:.2f} without any edit." if prefix == "edit" else ".")
        )
    weak = [row["attribute"] for row in tables["attributes"] if row["explained"] <= max(0.01, row["null_high"])]
    if weak:
        lines.append(f"Codes of {', '.join(weak)} explain nothing of this state: not linearly readable there.")
    counts = ", ".join(
        f"{row['interpretable']} of {row['alive']} ({row['dictionary']}; keeping them keeps {row['kept']:.2f})"
        for row in tables["interpretable"]
    )
    lines.append(f"Features that stand for attributes on held-out prompts: {counts}.")
    for name in (name for name in idle if name not in weak):
        row = next(iter(tables["interpretable"]))
        lines.append(
            f"{name} is readable and idle: {row[f'of_{name}']} of the interpretable features of {row['dictionary']} "
            "stand for it, though exchanging it whole changes nothing. A feature that can be named need not be used."
        )
    lines.append(
        "One state of a small model is compared here; the published comparison took the queries, keys, values and "
        "outputs of 26 heads of GPT-2."
    )
    return lines

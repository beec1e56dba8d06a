"""What is true of an organism: which variable sits where, and how that was certified.

A `GroundTruth` travels in the model's own directory: numbers in ``truth.json``, vectors in ``truth.safetensors``.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from subspace_probe.core.errors import ConfigError
from subspace_probe.core.sites import Site
from subspace_probe.core.tokens import Where

Numbers = Mapping[str, float]


@final
@dataclass(frozen=True, eq=False)
class Planted:
    """A variable that one coordinate of one site carries.

    Args:
        name: harmfulness, refusal or intent.
        site: the stream and layer.
        where: the position.
        vector: unit vector, shape [d_model], pointing towards value 1.
        interchange: interchange accuracy per cell of the language, on held-out pairs, over the whole vocabulary. Cells
            that the variable does not decide are right when the answer stays as it was.
        control: the same with a random unit vector in place of the planted one.
        n: prompts per cell.
    """

    name: str
    site: Site
    where: Where
    vector: Tensor
    interchange: Numbers
    control: Numbers
    n: int

    @property
    def accuracy(self) -> float:
        """The worst cell."""
        return min(self.interchange.values())


@final
@dataclass(frozen=True)
class ReadableNotUsed:
    """A variable that can be read at a position although the judgement does not come from there.

    Args:
        name: the variable.
        site: where a plain difference of means reads it best on validation pairs.
        where: the position.
        auroc: held-out AUROC of that difference of means, per cell.
        changed: share of judgements that change when the *whole* state at the position comes from a prompt of the
            other label: per layer, and at all layers at once.
        n: prompts per cell.
    """

    name: str
    site: Site
    where: Where
    auroc: Numbers
    changed: Numbers
    n: int


@final
@dataclass(frozen=True)
class SuffixTruth:
    """Which suffixes make a guard answer what it declines, from running every one of them.

    Args:
        slots: token positions of the free suffix, counted with the first special token.
        allowed: ids that were tried in every slot.
        planted: ids of the suffix that was planted to lift the guard; empty where none was.
        n: held-out declined prompts.
        n_suffixes: suffixes run on each of them.
        flipped: share of the prompts that at least one suffix flips.
        planted_flips: share of the prompts that the planted suffix flips, and to the right answer; 0 where none was
            planted.
        others: flips by any other suffix, counted over prompts and suffixes.
    """

    slots: tuple[int, ...]
    allowed: tuple[int, ...]
    planted: tuple[int, ...]
    n: int
    n_suffixes: int
    flipped: float
    planted_flips: float
    others: int


@final
@dataclass(frozen=True, eq=False)
class GroundTruth:
    """All that is known about an organism.

    Args:
        organism: its name.
        variables: what was planted.
        readable_not_used: what can be read but is not used; None where nothing of the kind was certified.
        accuracy: first word right on held-out prompts, per cell.
        behaviour: what the published interventions do here (steering, ablation, reading), by name.
        suffixes: which suffixes lift its guard; None in organisms that have no free suffix.
        provenance: seed, steps, versions.
    """

    organism: str
    variables: tuple[Planted, ...] = ()
    readable_not_used: ReadableNotUsed | None = None
    accuracy: Numbers = field(default_factory=dict[str, float])
    behaviour: Mapping[str, Numbers] = field(default_factory=dict[str, Numbers])
    provenance: Mapping[str, str | int] = field(default_factory=dict[str, str | int])
    suffixes: SuffixTruth | None = None

    def planted(self, name: str) -> Planted:
        """The planted variable of that name.

        Raises:
            ConfigError: the organism has no such variable.
        """
        for variable in self.variables:
            if variable.name == name:
                return variable
        known = ", ".join(v.name for v in self.variables) or "none"
        raise ConfigError(f"Organism {self.organism!r} has no planted variable {name!r}. Planted: {known}.")

    def save(self, folder: str | Path) -> Path:
        """Write ``truth.json`` and ``truth.safetensors`` into a model directory."""
        folder = Path(folder)
        unused = self.readable_not_used
        content = {
            "organism": self.organism,
            "variables": [
                {"name": v.name, "site": str(v.site), "where": str(v.where), "n": v.n,
                 "interchange": dict(v.interchange), "control": dict(v.control)}
                for v in self.variables
            ],
            "readable_not_used": None if unused is None else {
                "name": unused.name, "site": str(unused.site), "where": str(unused.where), "n": unused.n,
                "auroc": dict(unused.auroc), "changed": dict(unused.changed),
            },
            "accuracy": dict(self.accuracy),
            "behaviour": {name: dict(numbers) for name, numbers in self.behaviour.items()},
            "provenance": dict(self.provenance),
        }  # fmt: skip
        if self.suffixes is not None:
            content["suffixes"] = asdict(self.suffixes)
        (folder / "truth.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        # A file without tensors is valid, so every organism has both files.
        save_file({v.name: v.vector.contiguous() for v in self.variables}, folder / "truth.safetensors")
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "GroundTruth":
        """Read what `save` wrote.

        Raises:
            ConfigError: the directory has no ground truth.
        """
        folder = Path(folder)
        if not (folder / "truth.json").is_file():
            raise ConfigError(
                f"{str(folder)!r} holds no truth.json, so nothing is known to be true of this model. "
                "Give an organism's directory, or certify it first."
            )
        content = json.loads((folder / "truth.json").read_text(encoding="utf-8"))
        vectors = load_file(folder / "truth.safetensors")
        unused = content["readable_not_used"]
        return cls(
            organism=content["organism"],
            variables=tuple(
                Planted(
                    v["name"], Site.parse(v["site"]), Where.parse(v["where"]), vectors[v["name"]].to(torch.float32),
                    v["interchange"], v["control"], v["n"],
                )
                for v in content["variables"]
            ),
            readable_not_used=None if unused is None else ReadableNotUsed(
                unused["name"], Site.parse(unused["site"]), Where.parse(unused["where"]),
                unused["auroc"], unused["changed"], unused["n"],
            ),
            accuracy=content["accuracy"],
            behaviour=content["behaviour"],
            provenance=content["provenance"],
            suffixes=_suffix_truth(content["suffixes"]) if "suffixes" in content else None,
        )  # fmt: skip


def _suffix_truth(content: Mapping[str, Any]) -> SuffixTruth:
    """JSON has lists where the dataclass has tuples."""
    ids = {name: tuple(content[name]) for name in ("slots", "allowed", "planted")}
    return SuffixTruth(**{**content, **ids})

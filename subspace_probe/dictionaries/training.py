"""Train a sparse autoencoder on activations at hand, with the trainer of SAELens.

https://github.com/decoderesearch/SAELens. Nothing is logged anywhere, and the global random state is left as it was.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any, Literal, final, get_args

import torch
from torch import Tensor
from tqdm.auto import tqdm

from subspace_probe.core.activations import Activations
from subspace_probe.core.errors import ConfigError, DataError
from subspace_probe.core.sites import Site
from subspace_probe.dictionaries.autoencoder import SparseAutoencoder
from subspace_probe.dictionaries.shuffling import RandomRows

Trained = Literal["standard", "topk", "batchtopk", "jumprelu", "gated"]


@final
@dataclass(frozen=True)
class Training:
    """How a sparse autoencoder is trained.

    Args:
        architecture: "batchtopk" keeps k latents a row on average; it becomes a jumprelu one once it is trained.
        d_sae: number of latents.
        k: latents kept in each row; topk and batchtopk.
        penalty: weight of the sparsity loss, L1 for standard and gated, L0 for jumprelu; the others have none. It
            weighs against the squared error summed over a state of norm sqrt(d_in), where states are scaled.
        steps: batches.
        batch_size: rows a batch.
        lr: learning rate; it falls to zero over the last fifth of the steps.
        scale: scale states to a mean norm of sqrt(d_in) while training, so that `lr` and `penalty` mean the same at
            every site. The factor is folded into the weights afterwards.
        frozen_decoder: leave the decoder's rows as they were drawn and train the rest: a control, since what it
            reconstructs owes nothing to directions that were learned (Makelov, Lange & Nanda 2024, arXiv:2405.08366).
        held_out: share of the prompts that is not trained on; what the metadata say is measured there.
        buffer_rows: rows of a store on disk that are shuffled together in memory.
        seed: of the first weights, the held-out prompts and the order of rows.
    """

    architecture: Trained = "topk"
    d_sae: int = 4096
    k: int = 32
    penalty: float = 1.0
    steps: int = 4000
    batch_size: int = 1024
    lr: float = 1e-3
    scale: bool = True
    frozen_decoder: bool = False
    held_out: float = 0.1
    buffer_rows: int = 262_144
    seed: int = 0

    def __post_init__(self) -> None:
        if self.architecture not in get_args(Trained):
            known = ", ".join(get_args(Trained))
            raise ConfigError(f"Cannot train architecture={self.architecture!r}. Known: {known}.")
        for name in ("d_sae", "k", "steps", "batch_size", "buffer_rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Training was given {name}={getattr(self, name)}. It must be 1 or more.")
        if self.architecture in ("topk", "batchtopk") and self.k > self.d_sae:
            raise ConfigError(f"Training was given k={self.k}, but only d_sae={self.d_sae} latents.")
        if not (self.lr > 0 and self.penalty >= 0 and math.isfinite(self.lr + self.penalty)):
            raise ConfigError(
                f"Training was given lr={self.lr}, penalty={self.penalty}; they must be finite and positive."
            )


def train_sae(
    acts: Activations,
    site: Site,
    training: Training | None = None,
    *,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> SparseAutoencoder:
    """Train a sparse autoencoder on the activations of one site, in memory or on disk.

    Returns:
        The autoencoder in float32 on the CPU. Its metadata say where the rows came from, how it was trained, and on
        held-out prompts the share of variance explained and the mean number of active latents (`explained_variance`,
        `l0`). The same seed on the same machine gives the same weights.

    Raises:
        SiteError: a site that was not captured.
        ShapeError: non-finite activations.
        DataError: fewer rows to train on than a batch has.
        ConfigError: settings out of range, or prompts that cannot be split.
    """
    training = training or Training()
    held_out = torch.isin(acts.prompt, torch.tensor(acts.contrast.split_rows(training.held_out, seed=training.seed)[0]))
    n = int((~held_out).sum())
    if n < training.batch_size:
        raise DataError(f"There are {n} rows to train on, fewer than one batch of {training.batch_size}.")
    norm, start = 0.0, 0
    for block, _ in acts.batches(site):  # checks the rows on the way, before anything is trained
        norms = block.float().norm(dim=1).double().cpu()
        norm += float(norms[~held_out[start : start + len(block)]].sum())
        start += len(block)
    width = acts.rows.width(site)
    source = RandomRows(acts.rows, site, ~held_out, training.batch_size, training.buffer_rows, training.seed)
    factor = math.sqrt(width) * n / norm if training.scale and norm > 0 else 1.0
    scaled = (batch * factor for batch in source)
    sae = _fitted(training, width, scaled, torch.device(device), progress).folded(factor).moved(site)
    origin = {
        "model_name": acts.notes.get("model"),
        **{name: acts.notes.get(name) for name in ("fingerprint", "data", "data_hash")},
        "where": str(acts.where),
        "training": asdict(training),
        "rows": n,
        "held_out_rows": acts.rows.n - n,
    }
    metadata = {**sae.metadata, **origin, **reconstruction(sae, acts, site, held_out)}
    return replace(sae, configuration=replace(sae.configuration, metadata=metadata))


def reconstruction(
    sae: SparseAutoencoder, acts: Activations, site: Site, rows: Tensor | None = None
) -> dict[str, float]:
    """How well an autoencoder reconstructs activations, read a block at a time.

    Args:
        rows: which of them, a mask of shape [n]; default all.

    Returns:
        `explained_variance`: 1 - sum |x - sae(x)|^2 / sum |x - mean|^2. `l0`: mean number of active latents a row.
        `alive`: share of the latents that are active in at least one row.
    """
    rows = torch.ones(acts.rows.n, dtype=torch.bool) if rows is None else rows
    count, squares, left, active, start = 0, 0.0, 0.0, 0, 0
    total, fired = torch.zeros(sae.d_in, dtype=torch.float64), torch.zeros(sae.d_sae, dtype=torch.bool)
    first: Tensor | None = None  # sums of squares about some row lose no digits to a large common mean
    for whole, _ in acts.batches(site, size=1024):
        block = whole[rows[start : start + len(whole)].to(whole.device)]
        start += len(whole)
        if not len(block):
            continue
        with torch.no_grad():
            latents = sae.encode(block.to(sae.device))
            wrong = block.to(sae.device) - sae.decode(latents, block.to(sae.device))
        first = block[0].double().cpu() if first is None else first
        about = block.double().cpu() - first
        count, squares, total = count + len(block), squares + float(about.square().sum()), total + about.sum(0)
        left += float(wrong.double().square().sum())
        active += int((latents != 0).sum())
        fired |= (latents != 0).any(0).cpu()
    if not count:
        raise DataError("No rows were given to reconstruct.")
    variance = squares - float(total.square().sum()) / count
    explained = 1 - left / variance if variance > 0 else math.nan
    return {"explained_variance": explained, "l0": active / count, "alive": float(fired.float().mean())}


def _fitted(
    training: Training, width: int, batches: Iterator[Tensor], device: torch.device, progress: bool
) -> SparseAutoencoder:
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    settings = SAETrainerConfig(
        total_training_samples=training.steps * training.batch_size,
        train_batch_size_samples=training.batch_size,
        lr=training.lr,
        lr_end=training.lr,  # the trainer has no default for it
        lr_decay_steps=training.steps // 5,
        device=str(device),
        dead_feature_window=max(1, min(1000, training.steps // 4)),
        logger=LoggingConfig(log_to_wandb=False),
    )
    # first weights are drawn from the global generator
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(training.seed)
        trained = _untrained(training, width).to(device)
        trained.W_dec.requires_grad_(not training.frozen_decoder)
        trainer = SAETrainer(settings, trained, batches)
        # the steps of trainer.fit, without its progress bar, which cannot be turned off
        for batch in tqdm(islice(batches, training.steps), "SAE", training.steps, unit="batch", disable=not progress):
            trainer.step(batch)
            trainer.n_training_steps += 1
    return SparseAutoencoder.from_sae_lens(trained).to("cpu")


def _untrained(training: Training, width: int) -> Any:
    import sae_lens as lens

    shape: dict[str, Any] = {"d_in": width, "d_sae": training.d_sae}
    match training.architecture:
        case "topk":
            return lens.TopKTrainingSAE(lens.TopKTrainingSAEConfig(**shape, k=training.k))
        case "batchtopk":
            return lens.BatchTopKTrainingSAE(lens.BatchTopKTrainingSAEConfig(**shape, k=training.k))
        case "jumprelu":
            penalty: dict[str, Any] = {"l0_coefficient": training.penalty, "l0_warm_up_steps": training.steps // 10}
            return lens.JumpReLUTrainingSAE(lens.JumpReLUTrainingSAEConfig(**shape, **penalty))
        case "standard":
            penalty = {"l1_coefficient": training.penalty, "l1_warm_up_steps": training.steps // 10}
            return lens.StandardTrainingSAE(lens.StandardTrainingSAEConfig(**shape, **penalty))
        case "gated":
            penalty = {"l1_coefficient": training.penalty, "l1_warm_up_steps": training.steps // 10}
            return lens.GatedTrainingSAE(lens.GatedTrainingSAEConfig(**shape, **penalty))

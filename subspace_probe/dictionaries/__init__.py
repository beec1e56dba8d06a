"""Sparse autoencoders: read, encode, decode, splice into a model, train.

Reading and using one needs no other library; SAELens is imported only to train one or to fetch one by name.

    sae = load_sae("folder")  # or load_sae(release, sae_id), or train_sae(acts, Site(2))
    latents = sae.encode(acts.at(sae.site))
    run = model.run(batch, writes=splice(sae, lambda f: f * keep).at(model.backend))

What a dictionary could be where attributes are known is `SupervisedDictionary`; `sparse_edits` changes states through
few features, and `interpret` says what features stand for.
"""

from subspace_probe.dictionaries.autoencoder import SparseAutoencoder
from subspace_probe.dictionaries.configuration import Configuration
from subspace_probe.dictionaries.editing import SparseEdit, feature_weights, sparse_edits
from subspace_probe.dictionaries.hook_names import same_state, site_of
from subspace_probe.dictionaries.interpreting import Interpretation, Property, f1_scores, interpret
from subspace_probe.dictionaries.loading import load_sae
from subspace_probe.dictionaries.splicing import Splice, splice
from subspace_probe.dictionaries.supervised import SupervisedDictionary
from subspace_probe.dictionaries.training import Training, reconstruction, train_sae

__all__ = [
    "Configuration",
    "Interpretation",
    "Property",
    "SparseAutoencoder",
    "SparseEdit",
    "Splice",
    "SupervisedDictionary",
    "Training",
    "f1_scores",
    "feature_weights",
    "interpret",
    "load_sae",
    "reconstruction",
    "same_state",
    "site_of",
    "sparse_edits",
    "splice",
    "train_sae",
]

"""Why does an intervention have no effect? Every place where it can get lost is looked at, and the likeliest named."""

from subspace_probe.core.contrasts import Contrast
from subspace_probe.core.findings import Finding
from subspace_probe.core.protocols import Intervention, Metric, touches
from subspace_probe.core.reports import Provenance, Report, Table
from subspace_probe.diagnostics.answering import ranked, said_of
from subspace_probe.diagnostics.cases import Case
from subspace_probe.diagnostics.no_effect import measured
from subspace_probe.diagnostics.variants import looked
from subspace_probe.metrics import metric_for, name_of
from subspace_probe.models.hooked import HookedModel


def explain_no_effect(
    model: HookedModel,
    intervention: Intervention,
    contrast: Contrast,
    metric: str | Metric,
    *,
    natural: Contrast | None = None,
    neutral: Contrast | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Report:
    """Find out where the effect of an intervention is lost; it says so where there is one after all.

    Did it act, and on which tokens; how far did it move them, against their norm, the data's spread and the distance of
    the classes; does the move arrive at the last token, and does the metric depend on what was moved, to first order;
    would other layers, tokens or strengths do; what does an exchange of the whole state do there; is the text under it
    still a text; does the direction carry the concept or the prompt.

    Args:
        contrast: the prompts on which it has no effect; all of them are run, in their order.
        metric: a name from `METRICS`, or a callable from last-token logits and prompts to one number a prompt.
        natural: minimal pairs between which the variable differs (label 0 or 1), for whole exchanges and as a measure
            of size. Default: the contrast, where it has pairs.
        neutral: prompts whose answers should not change, to see what larger strengths disturb. Default: the contrast.
        seed: of every draw.

    Returns:
        A report with the findings `no_effect.effect`, `.fired`, `.size`, `.arrives`, `.read`, `.layers`, `.tokens`,
        `.strength`, `.whole`, `.text` and `.concept`, the answers by rank in the table `answers`, the likeliest in
        `summary`, and what was measured in `fired_tokens`, `arrivals`, `tried`.

    Raises:
        UnknownName: no such metric.
        ConfigError: an encoder, which has no next token.
        ShapeError, StaleStore: an intervention made for another model.
    """
    name, judge = name_of(metric), metric_for(metric, model)
    case = Case(model, intervention, contrast, judge, name, 0.0, neutral=neutral, seed=seed)
    if touches(model.tokens(contrast.prompts), intervention):
        look = looked(case, natural or contrast, progress=progress)
        findings, tables = measured(look)
        answers = ranked(look, {finding.name: finding for finding in findings})
    else:
        tables = dict[str, Table]()
        findings = [_untouched(case)]
        answers = [("tokens", findings[0].note, findings[0].name)]
    provenance = Provenance.now(
        model=model.spec.name,
        fingerprint=model.fingerprint,
        data=contrast.name,
        config={"intervention": repr(intervention), "metric": name},
        seed=seed,
    )
    return Report("explain_no_effect", tuple(findings), said_of(answers, findings) | tables, provenance)


def _untouched(case: Case) -> Finding:
    """The finding where no token of the prompts is meant."""
    note = (
        f"none of the tokens of these prompts is {str(case.intervention.where)!r}, so nothing was edited: choose other "
        "tokens, such as 'prompt', or measure what is generated"
    )
    claim = "the intervention acts on these prompts"
    return Finding("no_effect.fired", claim, 0.0, n=len(case.contrast), verdict="refuted", note=note)

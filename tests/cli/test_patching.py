"""`patch`, `sweep` and `ablate`: the command gives what the API gives, and what it cannot do it says in one message."""

from pathlib import Path

import pytest
import torch

from tests.cli.conftest import Cli, write_rows


@pytest.fixture
def answered(tmp_path: Path) -> Path:
    """Pairs of three words with answers, for the tiny models."""
    rows = [
        {"prompt": f"{x} {y} {word}", "label": label, "pair": pair, "answer": answer}
        for pair, (x, y) in enumerate((x, y) for x in "abc" for y in ("dog", "cat"))
        for word, label, answer in (("red", 1, "yes"), ("blue", 0, "no"))
    ]
    return write_rows(tmp_path / "answered.jsonl", rows)


def test_patch_is_the_api(cli: Cli, tiny: Path, answered: Path) -> None:
    import subspace_probe as sp

    done = cli("patch", "-m", tiny, "-c", answered.name, "--site", "L1.attn_out,L1.mlp_out", "--out", "report")
    assert done.exit_code == 0, done.output
    found = sp.Report.load("report/report.json")
    model, contrast = sp.load_model(str(tiny)), sp.load_contrast(answered)
    sites = [sp.Site(1, "attn_out"), sp.Site(1, "mlp_out")]
    wanted = sp.measure_patch(model, contrast, sites)
    assert [f.estimate for f in found.findings] == pytest.approx([f.estimate for f in wanted.findings])
    clean, corrupt = contrast.sides()
    source = sp.Source.of(model.capture(clean, sites=sites))
    logits = model.logits(corrupt, interventions=[sp.Patch(source)])
    yes, no = model.token_ids(["yes", "no"])
    by_hand = (logits[:, yes] - logits[:, no]).mean()
    assert found.finding("logit_difference.patched").estimate == pytest.approx(float(by_hand), abs=1e-5)
    assert (Path("report") / "report.html").stat().st_size > 1000
    last = cli("patch", "-m", tiny, "-c", answered.name, "--site", "L-1.resid_post", "--random", 0)
    assert "100% of the difference" in last.output  # the last state is the answer


def test_sweep_is_the_api(cli: Cli, tiny: Path, answered: Path) -> None:
    import subspace_probe as sp

    done = cli(
        "sweep", "-m", tiny, "-c", answered.name, "--stream", "resid_pre,mlp_out", "--layers", "0-1",
        "--attribution", 4, "--out", "report",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = sp.Report.load("report/report.json")
    clean, corrupt = sp.load_contrast(answered).sides()
    swept = sp.patch_sweep(
        sp.load_model(str(tiny)), clean, corrupt, "logit_difference", streams=("resid_pre", "mlp_out")
    )
    effects = torch.tensor([row["effect"] for row in found.tables["patch_sweep"].records()], dtype=torch.float64)
    torch.testing.assert_close(effects, swept.effect.flatten(), rtol=0, atol=1e-6)
    assert -1 <= found.finding("attribution.pearson").estimate <= 1
    assert "Which single states carry" in (Path("report") / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_ablate_shows_what_is_left_and_writes_it_into_the_weights(cli: Cli) -> None:
    import subspace_probe as sp

    contrast = sp.load_contrast("organism:chat/requests", split="train", n=96)
    model = sp.load_model("organism:chat")
    acts = model.capture(contrast.relabel("refused"), sites=sp.Site(2), where=sp.T_POST_INST)
    direction = sp.MeanDifference().fit(acts, sp.Site(2))
    direction.save("refusal.safetensors")
    rows = sp.load_contrast("organism:chat/requests", split="test", n=24)
    write_rows(
        Path("few.jsonl"), [{"prompt": p.shown, "label": y} for p, y in zip(rows.prompts, rows.labels, strict=True)]
    )
    done = cli(
        "ablate", "-m", "organism:chat", "-c", "few.jsonl", "--metric", "refusal_score", "-d", "refusal.safetensors",
        "--random", 5, "--show", 1, "--max-new-tokens", 4, "--save-model", "baked", "--out", "report",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    report = sp.Report.load("report/report.json")
    assert report.finding("control.integrity").verdict == "supported"
    baked = sp.load_model("baked")
    shown = sp.load_contrast("few.jsonl")
    wanted = model.logits(shown, interventions=[sp.Ablate(direction)])
    torch.testing.assert_close(baked.logits(shown), wanted, rtol=0, atol=1e-4)
    assert not torch.allclose(model.logits(shown), wanted, atol=1e-2)
    for mode in ("mean", "resample"):
        again = cli(
            "ablate", "-m", "organism:chat", "-c", "few.jsonl", "--metric", "refusal_score", "--site", "L2.mlp_out",
            "--mode", mode, "--where", "last", "--show", 0,
        )  # fmt: skip
        assert again.exit_code == 0, again.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["patch", "--site", "L1.resid_post", "--mode", "both"], "Known: denoise, noise"),
        (["patch", "--site", "L1.resid_post", "--align", "left"], "Known: end, repeat, start"),
        (["patch", "--site", "L9.resid_post"], "the model has 2 layers"),
        (
            ["patch", "--site", "L1.resid_post", "--where", "all", "--source-where", "last"],
            "say which token gets which",
        ),
        (["patch", "--site", "L1.resid_post", "--where", "generated"], "nothing to capture"),
        (["sweep", "--stream", "resid"], "Unknown stream"),
        (["sweep", "--layers", "one"], "0-3 or 0,2,-1"),
        (["sweep", "--heads"], "only z has heads"),
        (["ablate"], "Name the sites"),
        (["ablate", "--mode", "nothing"], "Known: mean, resample, zero"),
        (["ablate", "--site", "L1.mlp_out", "--mode", "resample"], "Give --where last"),
        (["ablate", "--site", "L1.mlp_out", "--save-model", "baked"], "Give --direction"),
    ],
)
def test_what_cannot_be_done_is_said(cli: Cli, tiny: Path, answered: Path, args: list[str], message: str) -> None:
    done = cli(args[0], "-m", tiny, "-c", answered.name, *args[1:], "--out", "report")
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.output.split())
    assert not Path("report").exists()
    assert not Path("baked").exists()

"""Each verb on a tiny random model: what it prints, and what lies on disk afterwards."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import QUICK, TEMPLATE, Cli


def test_find_writes_a_direction_and_shows_the_sweep(cli: Cli, tiny: Path, colours: Path) -> None:
    import subspace_probe as sp

    result = cli("find", "--model", tiny, "--contrast", colours.name, "--out", "deep/er/d.safetensors", "-q")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    found = sp.Subspace.load("deep/er/d.safetensors")
    assert found.found
    assert found.site in (sp.Site(0), sp.Site(1))
    assert found.where == sp.LAST
    assert found.notes["test_auroc"] == 1.0
    assert "L0.resid_post" in result.stdout
    assert "L1.resid_post" in result.stdout
    assert f"found at {found.site.short}, last: AUROC 1.000 on test prompts, p = 0.01" in result.stdout
    assert "wrote deep/er/d.safetensors" in result.stdout


@pytest.mark.slow
def test_find_is_the_api(cli: Cli, tiny: Path, colours: Path) -> None:
    import torch

    import subspace_probe as sp
    from subspace_probe.finders.sweep import find

    args = ("--site", "L1.resid_post,attn_out", "--set", "paired=true", "--set", "null_draws=19", "--seed", 3)
    assert cli("find", "--model", tiny, "--contrast", colours.name, *args).exit_code == 0
    model, contrast = sp.load_model(str(tiny)), sp.load_contrast(colours.name)
    sites = [sp.Site(0, "attn_out"), sp.Site(1, "attn_out"), sp.Site(1)]
    acts = model.capture(contrast, sites=sites, where="last")
    other = find(acts, sp.MeanDifference(paired=True, null_draws=19, seed=3), seed=3).subspace
    found = sp.Subspace.load("direction.safetensors")
    assert torch.equal(found.vector, other.vector)
    assert found.notes == other.notes


@pytest.mark.slow
def test_what_is_not_found_says_so_loudly(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    import subspace_probe as sp

    rows = [{"prompt": f"{x} {y}", "label": i % 2} for i, (x, y) in enumerate((x, y) for x in "abcde" for y in "abcde")]
    rows = [row | {"label": int(i * 7919 % 23 < 11)} for i, row in enumerate(rows)]
    (tmp_path / "noise.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = cli("find", "--model", tiny, "--contrast", "noise.jsonl", "-q", *QUICK)
    assert result.exit_code == 0, result.output
    assert not sp.Subspace.load("direction.safetensors").found
    assert "NOT FOUND" in result.stdout
    steered = cli(
        "steer", "-m", tiny, "-d", "direction.safetensors", "-s", "1", "-p", "a b", "--max-new-tokens", 2, "-q"
    )
    assert steered.exit_code == 0, steered.output
    assert "NOT FOUND" in steered.stdout


def test_capture_is_the_api(cli: Cli, tiny: Path, colours: Path) -> None:
    import torch

    import subspace_probe as sp
    from subspace_probe.store import open_activations

    result = cli(
        "capture",
        "--model",
        tiny,
        "--contrast",
        colours.name,
        "--site",
        "resid_post,L0.z",
        "--where",
        "all",
        "-o",
        "acts",
    )
    assert result.exit_code == 0, result.output
    assert "240 rows at all of 80 prompts from colours" in result.stdout
    stored = open_activations("acts")
    sites = [sp.Site(0, "z"), sp.Site(0), sp.Site(1)]
    acts = sp.load_model(str(tiny)).capture(sp.load_contrast(colours.name), sites=sites, where=sp.ALL)
    assert stored.notes == acts.notes
    for site in sites:
        assert torch.equal(stored.at(site), acts.at(site))


@pytest.mark.slow
def test_steer_writes_a_report(cli: Cli, tiny: Path, colours: Path) -> None:
    import subspace_probe as sp

    assert cli("find", "--model", tiny, "--contrast", colours.name).exit_code == 0
    result = cli(
        "steer", "--model", tiny, "--direction", "direction.safetensors", "--strength", "-1,2", "--strength", "4",
        "--contrast", colours.name, "--answer", "She", "--foil", "He", "--random", 5, "--show", 2,
        "--max-new-tokens", 3, "--out", "report", "--seed", 5, "-q",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = sp.Report.load("report/report.json")
    names = ["logit_difference.-1", "logit_difference.+2", "logit_difference.+4", "control.integrity"]
    assert [finding.name for finding in report.findings] == names
    assert report.finding("control.integrity").estimate == 0.0
    completions = report.tables["completions"]
    assert list(dict.fromkeys(completions.column("condition"))) == [
        "unsteered", "strength -1", "strength +2", "strength +4", "random +4",
    ]  # fmt: skip
    assert len(set(completions.column("prompt"))) == 2
    assert "</html>" in Path("report/report.html").read_text()

    # the numbers are those of the API, computed another way
    model, contrast = sp.load_model(str(tiny)), sp.load_contrast(colours.name)
    dose = sp.Steer(sp.Subspace.load("direction.safetensors"), 2.0)
    she, he = model.token_ids(["She", "He"])
    clean, steered = model.logits(contrast), model.logits(contrast, interventions=[dose])
    moved = (steered - clean)[:, she] - (steered - clean)[:, he]
    assert report.finding("logit_difference.+2").estimate == pytest.approx(float(moved.mean()), abs=1e-4)
    texts = model.generate(contrast.prompts[:2], interventions=[dose], max_new_tokens=3)
    assert completions.where(condition="strength +2").column("text") == texts


def test_a_prompt_cannot_steer_the_terminal(cli: Cli, tiny: Path) -> None:
    import torch

    import subspace_probe as sp

    sp.Subspace.span(torch.ones(16), site=sp.Site(0)).save("direction.safetensors")
    prompt = "a [bold]red[/bold] \x1b[31mb \u202e the dog"
    result = cli("steer", "-m", tiny, "-d", "direction.safetensors", "-s", "1", "-p", prompt, "--max-new-tokens", 2)
    assert result.exit_code == 0, result.output
    assert "a [bold]red[/bold] ·[31mb · the dog" in result.stdout
    assert "\x1b" not in result.stdout


def test_positions_of_the_template(cli: Cli, make_model: Callable[..., Path], colours: Path) -> None:
    import subspace_probe as sp

    model = make_model(template=TEMPLATE)
    result = cli(
        "find", "-m", model, "-c", colours.name, "--where", "t_inst", "--template", "enable_thinking=false", *QUICK
    )
    assert result.exit_code == 0, result.output
    assert str(sp.Subspace.load("direction.safetensors").where) == "t_inst"


@pytest.mark.slow
def test_columns_of_another_file(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    import subspace_probe as sp

    starts = [f"{x} {y}" for x in "abcde" for y in "one two three dog cat said the green".split()]
    rows = [("question", "is_bad")]
    rows += [(f"{start} {word}", said) for start in starts for word, said in (("red", "yes"), ("blue", "no"))]
    (tmp_path / "rows.csv").write_text("\n".join(",".join(row) for row in rows))
    mapping = "prompt=question,label=is_bad,positive=yes"
    result = cli("find", "-m", tiny, "-c", "rows.csv", "--columns", mapping, *QUICK)
    assert result.exit_code == 0, result.output
    notes = sp.Subspace.load("direction.safetensors").notes
    assert notes["n_positive"] == notes["n_negative"]


def test_a_report_is_drawn_again(cli: Cli, tmp_path: Path) -> None:
    from subspace_probe.core.findings import Expectation, Finding, Interval
    from subspace_probe.core.reports import Report, Table

    interval, null = Interval(0.8, 0.99), Interval(-0.1, 0.1)
    findings = (
        Finding("cosine.same_position", "they differ", 0.93, interval, null, 128, "supported", Expectation(above=0.85)),
        Finding("rate.random", "nothing", 0.4, interval, null, 128, "refuted", Expectation(below=0.05), "a reason"),
        Finding("control.stability", "stable", float("nan"), verdict="not tested", note="no refit"),
    )
    report = Report("harmfulness", findings, {"summary": Table(("sentence",), (("It does [bold].",),))})
    report.save(tmp_path / "r.json")
    result = cli("report", "r.json")
    assert result.exit_code == 0, result.output
    assert "</html>" in Path("r.html").read_text()
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "cosine.same_position 0.930 [0.800, 0.990] [-0.100, 0.100] 128 ✓ >= 0.85 supported" in lines
    assert "rate.random 0.400 [0.800, 0.990] [-0.100, 0.100] 128 ✗ <= 0.05 refuted" in lines
    assert "control.stability n/a not tested" in lines
    assert "It does [bold]." in lines
    assert "! rate.random is 0.400, expected <= 0.05: nothing (a reason)" in lines


@pytest.mark.parametrize("args", [["--version"], ["--help"], ["-h"], ["steer", "--help"], ["organisms", "--help"]])
def test_help_is_quick_to_load(args: list[str]) -> None:
    """No model library is imported before there is work for it."""
    heavy = ("torch", "transformers", "plotly", "sklearn", "numpy", "datasets")
    program = (
        "import sys\nfrom subspace_probe.cli.main import main\ntry:\n    main()\nexcept SystemExit as done:\n"
        f"    assert not done.code, done\nprint('LOADED', *[name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, *args], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED"


def test_the_global_flags_stand_anywhere(cli: Cli, tiny: Path, colours: Path) -> None:
    args = ["capture", "--model", tiny, "--contrast", colours.name, "--out", "acts"]
    assert cli("--quiet", *args).stderr == ""
    assert cli(*args, "--quiet").stderr == ""
    assert "capture" in cli(*args).stderr


@pytest.mark.slow
@pytest.mark.usefixtures("few")
def test_find_ranks_positions_and_finders(cli: Cli, tmp_path: Path) -> None:
    """Several of each in one sweep; what the finders warn of is said once, in plain words."""
    result = cli(
        "-q", "find", "--model", "organism:chat", "--contrast", "organism:chat/harmfulness",
        "--finder", "mean_difference,pca", "--where", "t_inst,t_post_inst", "--site", "L0.resid_post,L1.resid_post",
        "-o", tmp_path / "best.safetensors",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "best of 8, corrected" in result.stdout
    assert "t_post_inst" in result.stdout
    assert result.stdout.count("outside of the subspace the class means differ") <= 3
    assert "IllusionWarning" not in result.output


@pytest.mark.slow
@pytest.mark.usefixtures("few")
def test_find_with_a_finder_that_runs_the_model(cli: Cli, tmp_path: Path) -> None:
    from subspace_probe.core.subspaces import Subspace

    where = ["--site", "L2.resid_post", "--where", "last", "-o", tmp_path / "das.safetensors"]
    result = cli(
        "-q", "find", "--model", "organism:chat", "--contrast", "organism:chat/knob", "--finder", "das",
        "--set", "steps=20", "--set", "restarts=0", "--set", "controls=labels", *where,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for part in ("iia", "control_labels", "floor", "found at L2.resid_post, last"):
        assert part in result.stdout
    assert Subspace.load(tmp_path / "das.safetensors").notes["settings"]["steps"] == 20


@pytest.mark.slow
@pytest.mark.usefixtures("few")
def test_find_prints_every_candidate_of_the_published_rule(cli: Cli, tmp_path: Path) -> None:
    result = cli(
        "-q", "find", "--model", "organism:chat", "--contrast", "organism:chat/harmfulness", "--select", "published",
        "-o", tmp_path / "refusal.safetensors",
    )  # fmt: skip
    assert "filtered out" in result.stdout
    # in four blocks the rule leaves layers 0 to 2, and refusal is written at the end of block 2
    assert result.exit_code == 2
    assert "No candidate survives the published filters" in result.stderr
    assert not (tmp_path / "refusal.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--finder", "das", "--where", "last"], "das runs the model at one site and position, but 4 sites and 1"),
        (["--finder", "das,pca"], "Several finders were given, but das runs the model itself"),
        (["--finder", "lda,pca", "--set", "rank=2"], "Several finders were given, but --set is for one finder"),
        (["--finder", "weight_delta", "--site", "L2.resid_post"], "weight_delta needs other. Give --other DIR."),
        (["--finder", "sae_latents"], "sae_latents needs sae. Give --set sae=..."),
        (["--other", "x"], "--other was given, which only --finder weight_delta takes"),
        (["--finder", "dsa"], "Unknown finder 'dsa'."),
    ],
)
def test_find_says_what_does_not_go_together(cli: Cli, options: list[str], message: str) -> None:
    result = cli("-q", "find", "--model", "organism:chat", "--contrast", "organism:chat/knob", *options)
    assert result.exit_code == 2
    assert message in result.stderr

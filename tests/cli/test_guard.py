"""`guard` through the command alone: what each verb writes, says and refuses, and how it ends."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from tests.cli.conftest import Cli, write_rows
from tests.models.tiny import text, tiny
from tests.models.tiny import words as tokenizer

if TYPE_CHECKING:
    from subspace_probe.guard.guard import LatentGuard
    from subspace_probe.models.hooked import HookedModel

pytestmark = pytest.mark.slow

MODEL = ("--model", "organism:chat")
QUICK = ("--layers", "2", "--target-fpr", "0.05", "-q")


def rows(split: str, start: int, n: int) -> list[dict[str, Any]]:
    """So many groups of plain requests, a harmful and a harmless one each."""
    import subspace_probe as sp

    contrast = sp.load_contrast("organism:chat/requests", split=split).where(framing=0)
    groups = list(dict.fromkeys(contrast.groups))[start : start + n]
    return [
        {"id": row, "prompt": contrast.prompts[row].shown, "label": contrast.labels[row], "group": contrast.groups[row]}
        for row in range(len(contrast))
        if contrast.groups[row] in groups
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl, test.jsonl, and a guard fitted on the first by the command."""
    from typer.testing import CliRunner

    from subspace_probe.cli.main import app

    folder = tmp_path_factory.mktemp("guard")
    write_rows(folder / "train.jsonl", rows("train", 0, 240))
    write_rows(folder / "test.jsonl", rows("test", 0, 40))
    args = ["guard", "fit", *MODEL, "-c", str(folder / "train.jsonl"), "-o", str(folder / "g"), *QUICK, "--gate"]
    result = CliRunner().invoke(app, args, env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    (folder / "said.txt").write_text(result.stdout, encoding="utf-8")
    return folder


def loaded(folder: Path, model: "HookedModel") -> "LatentGuard":
    from subspace_probe.guard.guard import LatentGuard

    return LatentGuard.load(folder, model)


def said(result: Any, code: int = 2) -> str:
    """What stands on stderr of a command that ends so, on one line."""
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


def left() -> set[str]:
    return {str(path) for path in Path().rglob("*")}


# ----------------------------------------------------------------------------------------------------------------- fit
def test_fit_says_what_each_part_got_and_what_holds(made: Path, chat: "HookedModel") -> None:
    import subspace_probe as sp

    lines = [" ".join(line.split()) for line in (made / "said.txt").read_text(encoding="utf-8").splitlines()]
    assert "fitted on 240 120 120 120" in lines
    assert "calibrated on 96 48 48 48" in lines
    assert "used to set the threshold 72 0 72 72" in lines
    guard = loaded(made / "g", chat)
    assert guard.layers == (2,)
    assert guard.gate is not None
    assert guard.calibration is not None
    assert guard.threshold is not None
    assert (guard.threshold.n, guard.threshold.target_fpr, guard.threshold.confidence) == (72, 0.05, 0.95)
    assert f"Of the 72 positives set aside with these negatives it flags {1:.1%}." in lines
    assert not guard.seen["fit"] & (guard.seen["calibrate"] | guard.seen["threshold"])
    assert not guard.seen["calibrate"] & guard.seen["threshold"]
    assert guard.score(sp.load_contrast(str(made / "test.jsonl"))) >= 0.95


def test_too_few_negatives_leave_nothing_behind(cli: Cli, made: Path, chat: "HookedModel") -> None:
    args = ("guard", "fit", *MODEL, "-c", made / "train.jsonl", "--layers", "2", "-q")
    message = said(cli(*args))
    assert "A false-positive rate of 0.01 with confidence 0.95 was asked for on 72 negatives" in message
    assert "It takes at least 299." in message
    assert "--no-threshold writes a guard that promises no rate" in message
    assert not left()
    result = cli(*args, "--no-threshold", "--calibrate", "none")
    assert result.exit_code == 0, result.output
    assert "! No threshold:" in result.stdout
    assert "! Not calibrated:" in result.stdout
    guard = loaded(Path("guard"), chat)
    assert guard.threshold is None
    assert guard.calibration is None
    assert len(guard.seen["fit"]) == 480  # nothing was kept back


def test_negatives_of_their_own(cli: Cli, made: Path, chat: "HookedModel") -> None:
    """A file without labels; one with positives in it and one that was fitted on are refused."""
    benign = [row for row in rows("train", 240, 80) if not row["label"]]
    write_rows(Path("benign.jsonl"), [{"prompt": row["prompt"], "group": row["group"]} for row in benign])
    fit = ("guard", "fit", *MODEL, "-c", made / "train.jsonl", *QUICK, "-o", "g", "--confidence", "none")
    result = cli(*fit, "--negatives", "benign.jsonl")
    assert result.exit_code == 0, result.output
    assert "! The rate holds on average" in result.stdout
    threshold = loaded(Path("g"), chat).threshold
    assert threshold is not None
    assert (threshold.n, threshold.confidence) == (len(benign), None)
    write_rows(Path("mixed.jsonl"), [*benign, *rows("train", 320, 1)])
    message = said(cli("guard", "threshold", "g", "--negatives", "mixed.jsonl"))
    assert f"mixed.jsonl:{len(benign) + 2}: label is 1" in message or "label is 1" in message
    own = [row for row in rows("train", 0, 240) if not row["label"]]
    write_rows(Path("own.jsonl"), own)
    before = Path("g/guard.json").read_bytes()
    assert "are among those the guard was fitted on" in said(
        cli("guard", "threshold", "g", "--negatives", "own.jsonl", "--target-fpr", "0.1", "-q")
    )
    assert Path("g/guard.json").read_bytes() == before


def test_a_threshold_set_anew(cli: Cli, made: Path, chat: "HookedModel") -> None:
    import shutil

    shutil.copytree(made / "g", "g")
    write_rows(Path("benign.jsonl"), [row for row in rows("train", 240, 80) if not row["label"]])
    result = cli("guard", "threshold", "g", "--negatives", "benign.jsonl", "--target-fpr", "0.1", "-q")
    assert result.exit_code == 0, result.output
    new, old = loaded(Path("g"), chat), loaded(made / "g", chat)
    assert new.threshold is not None
    assert (new.threshold.n, new.threshold.target_fpr) == (80, 0.1)
    assert new.probe.tensors().keys() == old.probe.tensors().keys()
    assert (new.probe.coef_ == old.probe.coef_).all()


def test_negatives_read_elsewhere_than_traffic_are_said(cli: Cli, made: Path) -> None:
    """Of negatives with a part marked as the instruction, the rate does not carry over to prompts without."""
    import shutil

    shutil.copytree(made / "g", "g")
    plain = [row["prompt"] for row in rows("train", 240, 80) if not row["label"]]
    for extra, warned in ((" . it is only for a play", True), ("", False)):
        write_rows(Path("b.jsonl"), [{"prompt": asked + extra, "instruction": asked} for asked in plain])
        result = cli("guard", "threshold", "g", "--negatives", "b.jsonl", "--target-fpr", "0.1", "-q")
        assert result.exit_code == 0, result.output
        assert ("! 80 negatives say which part of the message is the instruction" in result.stdout) == warned


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--method": "ldaa"}, "Unknown guard method 'ldaa'. Did you mean 'lda'?"),
        ({"--layers": "two"}, "--layers two was given. Give auto, or numbers such as 12,13."),
        ({"--layers": "9"}, "Layer 9 was asked for, but the model has 4 layers"),
        ({"--where": "t_isnt"}, "Unknown position 't_isnt'"),
        ({"--stream": "resid"}, "Unknown stream 'resid'"),
        ({"--calibrate": "platt"}, "Unknown calibration 'platt'"),
        ({"--confidence": "high"}, "--confidence high was given. Give a number such as 0.95, or none."),
        ({"--target-fpr": "5"}, "A false-positive rate of 5.0 was asked for. It lies between 0 and 1."),
        ({"--shares": "0.5,0.5"}, "--shares 0.5,0.5 was given. Give three numbers"),
        ({"--shares": "0,1,1"}, "the first, to fit on, above 0"),
        ({"--nuisance": "group"}, "Unknown factor 'group'"),
        ({"--negatives": "none.jsonl"}, "No file 'none.jsonl'"),
        ({"--out": "/proc/guard"}, "Cannot write '/proc/guard'"),
        ({"--model": "organism:chta"}, "Unknown organism 'chta'"),
    ],
)
def test_fit_says_what_is_wrong(cli: Cli, made: Path, options: dict[str, str], message: str) -> None:
    given = {"--model": "organism:chat", "--layers": "2", "--target-fpr": "0.05"} | options
    args = [part for pair in given.items() for part in pair]
    assert message in said(cli("guard", "fit", "-c", made / "train.jsonl", *args, "-q"))
    assert not left()


# --------------------------------------------------------------------------------------------------------------- score
def test_scores_are_the_guards_own(cli: Cli, made: Path, chat: "HookedModel") -> None:
    from subspace_probe.core.prompts import Prompt

    result = cli("guard", "score", made / "g", "--prompts", made / "test.jsonl", "-q")
    assert result.exit_code == 0, result.output
    given = [json.loads(line) for line in (made / "test.jsonl").read_text().splitlines()]
    found = [json.loads(line) for line in result.stdout.splitlines()]  # nothing but JSON lines there
    judged = loaded(made / "g", chat).judge([Prompt(row["prompt"]) for row in given])
    assert [(row["id"], row["index"]) for row in found] == [(row["id"], i) for i, row in enumerate(given)]
    for row, judgement in zip(found, judged, strict=True):
        assert row["score"] == pytest.approx(judgement.score, abs=1e-4)
        assert (row["flagged"], row["abstained"]) == (judgement.flagged, judgement.abstained)
    assert f"{len(given)} lines: flagged {sum(row['flagged'] for row in found)}" in result.stderr


def test_an_ended_run_goes_on_to_the_same_bytes(cli: Cli, made: Path) -> None:
    score = ("guard", "score", made / "g", "-p", made / "test.jsonl", "-q", "--window", "16")
    assert cli(*score, "-o", "whole.jsonl").exit_code == 0
    assert cli(*score, "-o", "out.jsonl").exit_code == 0
    whole, out = Path("whole.jsonl").read_bytes(), Path("out.jsonl")
    assert out.read_bytes() == whole
    out.write_bytes(whole[:-300])  # the last window was being written, its last line is torn
    result = cli(*score[:-2], "-o", "out.jsonl")
    assert result.exit_code == 0, result.output
    assert out.read_bytes() == whole
    assert "wrote out.jsonl" in result.stdout
    again = cli(*score, "-o", "out.jsonl")
    assert again.stdout.startswith("Nothing new")
    assert out.read_bytes() == whole


def test_what_another_guard_wrote_is_not_gone_on_with(cli: Cli, made: Path) -> None:
    import shutil

    shutil.copytree(made / "g", "g")
    score = ("guard", "score", "g", "-p", made / "test.jsonl", "-q", "-o", "out.jsonl")
    assert cli(*score).exit_code == 0
    before = Path("out.jsonl").read_bytes()
    write_rows(Path("benign.jsonl"), [row for row in rows("train", 240, 80) if not row["label"]])
    assert cli("guard", "threshold", "g", "--negatives", "benign.jsonl", "--target-fpr", "0.1", "-q").exit_code == 0
    assert "was made by another guard" in said(cli(*score))
    assert Path("out.jsonl").read_bytes() == before
    assert cli(*score, "--fresh").exit_code == 0


def test_a_pipe_and_lines_that_are_none(made: Path, cli: Cli) -> None:
    from typer.testing import CliRunner

    from subspace_probe.cli.main import app

    given = '{"prompt": "please dry the shelf", "id": "a"}\nnonsense\n{"prompt": "' + "dry " * 300 + '"}\n'
    score = ["guard", "score", str(made / "g"), "--prompts", "-", "-q"]
    result = CliRunner().invoke(app, score, input=given)
    assert "<stdin>:2: not JSON" in said(result)
    assert result.stdout == ""
    skipped = CliRunner().invoke(app, [*score, "--skip-bad"], input=given)
    assert skipped.exit_code == 0, skipped.output
    first, second, third = map(json.loads, skipped.stdout.splitlines())
    assert first["id"] == "a"
    assert "not JSON" in second["error"]
    assert "longer than the model's context" in third["error"]
    assert "2 could not be judged" in skipped.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("none", "-p", "in.jsonl"), "No guard in 'none'"),
        (("{g}", "-p", "none.jsonl"), "No file 'none.jsonl'"),
        (("{g}", "-p", "in.jsonl", "--fresh"), "--fresh was given, but nothing lies in standard output"),
        (("{g}", "-p", "in.jsonl", "-o", "in.jsonl"), "is both the input and the output"),
        (("{g}", "-p", "in.jsonl", "-o", "other.jsonl"), "without the record of what made it"),
        (("{g}", "-p", "in.jsonl", "-m", "organism:chat-base"), "Load the guard's own model"),
        (("{g}", "-p", "in.jsonl", "-m", "./elsewhere"), "No model folder './elsewhere'"),
        (("{g}", "-p", "in.jsonl", "--columns", "promt=x"), "Unknown role in --columns 'promt'"),
    ],
)
def test_score_says_what_is_wrong(cli: Cli, made: Path, options: tuple[str, ...], message: str) -> None:
    write_rows(Path("in.jsonl"), [{"prompt": "please dry the shelf"}])
    write_rows(Path("other.jsonl"), [{"index": 0}])
    before = left()
    args = [str(made / "g") if part == "{g}" else part for part in options]
    assert message in said(cli("guard", "score", *args, "-q"))
    assert left() == before


def test_other_weights_only_when_allowed(cli: Cli, made: Path) -> None:
    write_rows(Path("in.jsonl"), [{"prompt": "please dry the shelf"}])
    other = ("guard", "score", made / "g", "-p", "in.jsonl", "-m", "organism:chat-base", "-q")
    assert "--allow-model-mismatch" in said(cli(*other))
    allowed = cli(*other, "--allow-model-mismatch")
    assert allowed.exit_code == 0, allowed.output


# ------------------------------------------------------------------------------------------------------------- encoder
def test_a_guard_on_a_sentence_encoder(cli: Cli) -> None:
    """Fit and score on a random model of the bert family, from its folder; the model is then moved."""
    tiny("bert").save_pretrained("encoder")
    tokenizer().save_pretrained("encoder")
    found = [
        {"prompt": f"{text(4, 2 * i + label)} {'w5 w5' if label else 'w9 w9'}", "label": label, "group": i}
        for i in range(150)
        for label in (0, 1)
    ]
    write_rows(Path("train.jsonl"), found)
    fit = cli("guard", "fit", "-m", "./encoder", "-c", "train.jsonl", "--layers", "1", "--target-fpr", "0.1", "-q")
    assert fit.exit_code == 0, fit.output
    assert "resid_post 1 of ./encoder at all" in fit.stdout
    write_rows(Path("in.jsonl"), [{"prompt": row["prompt"]} for row in found])
    result = cli("guard", "score", "guard", "-p", "in.jsonl", "-q")
    assert result.exit_code == 0, result.output
    judged = [json.loads(line)["score"] > 0 for line in result.stdout.splitlines()]
    assert sum(a == b["label"] for a, b in zip(judged, found, strict=True)) >= 225  # chance: 150, give or take 9
    Path("encoder").rename("moved")
    assert "say where it is now with --model" in said(cli("guard", "score", "guard", "-p", "in.jsonl", "-q"))
    assert cli("guard", "score", "guard", "-p", "in.jsonl", "-m", "./moved", "-q").exit_code == 0


# ------------------------------------------------------------------------------------------- report, comparison, server
@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Put stand-ins in the place of what makes reports and of the server; what they are called with comes back."""
    import subspace_probe.guard.guard
    from subspace_probe.core.findings import Expectation, Finding
    from subspace_probe.core.reports import Provenance, Report

    told: dict[str, Any] = {}

    def report(*given: Any, **settings: Any) -> Report:
        told.update(settings, given=given)
        finding = Finding("auroc", "it tells them apart", 0.5, expected=Expectation(above=0.9))
        return Report("latent_guard", (finding,), {}, Provenance.now(model="m", seconds=1.0))

    def module(name: str, **names: Any) -> None:
        made = ModuleType(name)
        made.__dict__.update(names)
        monkeypatch.setitem(sys.modules, name, made)

    monkeypatch.setattr(subspace_probe.guard.guard, "guard_report", report)
    module("subspace_probe.guard.comparison", compare_guards=report)
    module("subspace_probe.serve.app", serve=lambda *given: told.update(given=given))
    module("subspace_probe.serve.settings", ServerSettings=dict)
    return told


def test_eval_hands_on_what_it_was_given(cli: Cli, made: Path, heard: dict[str, Any]) -> None:
    import subspace_probe as sp

    write_rows(Path("hard.jsonl"), [{"prompt": "please dry the shelf"}])
    result = cli(
        "guard", "eval", made / "g", "-c", made / "test.jsonl", "--train", made / "train.jsonl", "--seed", 3,
        "--hard-benign", "hard.jsonl", "--slices", "id, verb", "--source", "origin", "-o", "r", "-q",
    )  # fmt: skip
    assert result.exit_code == 1, result.output  # one finding is not as expected, and the report is there
    guard, contrast = heard["given"][:2]
    assert guard.layers == (2,)
    assert len(contrast) == 80
    assert len(heard["train"]) == 480
    assert heard["hard_benign"].labels == (0,)
    assert (heard["slices"], heard["source"], heard["seed"]) == (("id", "verb"), "origin", 3)
    assert sp.Report.load("r/report.json").finding("auroc").estimate == 0.5
    assert "</html>" in Path("r/report.html").read_text(encoding="utf-8")


def test_eval_ends_with_1_where_the_threshold_breaks_its_promise(
    cli: Cli, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing has an expectation here; the control differs in the verdict alone."""
    import subspace_probe.guard.guard
    from subspace_probe.core.findings import Finding
    from subspace_probe.core.reports import Provenance, Report

    found = Finding("fpr.at_threshold", "it keeps its promise", 0.2)
    for finding, code in ((replace(found, verdict="refuted"), 1), (replace(found, verdict="supported"), 0)):
        report = Report("latent_guard", (finding,), {}, Provenance.now(model="m", seconds=1.0))
        monkeypatch.setattr(subspace_probe.guard.guard, "guard_report", lambda *_, report=report, **__: report)
        result = cli("guard", "eval", made / "g", "-c", made / "test.jsonl", "-q")
        assert result.exit_code == code, result.output
        assert ("! fpr.at_threshold is 0.2: it keeps its promise" in result.stdout) == (code == 1)


def test_compare_loads_the_model_once(cli: Cli, made: Path, heard: dict[str, Any]) -> None:
    two = (made / "g", made / "g")
    result = cli("guard", "compare", *two, "-c", made / "test.jsonl", "--slices", "id", "-o", "r", "-q")
    assert result.exit_code == 1, result.output
    first, second, contrast = heard["given"][:3]
    assert first is not second
    assert first.model is second.model
    assert len(contrast) == 80
    assert (heard["slices"], heard["names"]) == (("id",), (str(made / "g"), str(made / "g")))
    assert Path("r/report.json").is_file()


def test_serve_never_takes_a_token_from_the_command_line(
    cli: Cli, made: Path, heard: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = ("guard", "serve", made / "g", "-q")
    monkeypatch.setenv("GUARD_TOKEN", " secret\n")
    Path("token").write_text("other\n")
    for given, token in (((), None), (("--token-env", "GUARD_TOKEN"), "secret"), (("--token-file", "token"), "other")):
        assert cli(*serve, "--port", "0", *given).exit_code == 0
        guard, settings = heard["given"]
        assert guard.layers == (2,)
        assert settings["token"] == token
        assert (settings["host"], settings["port"], settings["log_prompts"]) == ("127.0.0.1", 0, False)
        assert settings["block_abstained"] is False
    assert cli(*serve, "--block-abstained").exit_code == 0
    assert heard["given"][1]["block_abstained"] is True
    assert "No such option: --token" in cli(*serve, "--token", "x").output
    Path("empty").write_text("\n")
    for given, message in (
        (("--token-env", "NO_TOKEN"), "that variable is not set"),
        (("--token-file", "nowhere"), "Cannot read the token"),
        (("--token-file", "empty"), "is empty"),
        (("--token-file", "token", "--token-env", "GUARD_TOKEN"), "Both --token-env and --token-file"),
    ):
        assert message in said(cli(*serve, *given))


def test_serve_without_its_extra(cli: Cli, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("subspace_probe.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    message = said(cli("guard", "serve", made / "g"))
    assert "The server needs fastapi. Install: pip install 'subspace-probe[serve]'" in message
